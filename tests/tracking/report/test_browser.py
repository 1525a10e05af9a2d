"""The report in a real Chromium: nothing is fetched, nothing complains, the pointer reads values, data stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, MARKS, playwright
from tests.tracking.report.test_page import EVIL, work_dir  # noqa: F401
from xtuner.tracking.report.page import write_report

pytestmark = MARKS


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_works_alone(work_dir: Path, scheme: Any) -> None:  # noqa: F811
    path = write_report(work_dir)
    requests, complaints, dialogs = [], [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(color_scheme=scheme)
        page.on('request', lambda request: requests.append(request.url))
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('dialog', lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        chart = page.locator('svg.chart').first
        box = chart.bounding_box()
        assert box
        page.mouse.move(box['x'] + box['width'] * 0.999, box['y'] + box['height'] * 0.9)
        reading = page.locator('.reading').first
        assert reading.is_visible()
        assert reading.inner_text() == 'step 60 · training 2.000'
        page.mouse.move(1, 1)
        assert not reading.is_visible()
        page.get_by_text('config.py').click()
        assert EVIL in page.locator('pre').inner_text()
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        page.set_viewport_size({'width': 390, 'height': 800})
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        browser.close()
    assert requests == [path.as_uri()]
    assert not complaints
    assert not dialogs
