"""A real browser for tests: Playwright drives the Chromium installed. Importing this skips where there is none."""

from __future__ import annotations

import shutil

import pytest

playwright = pytest.importorskip(
    'playwright.sync_api', reason="driving a browser needs Playwright: pip install 'xtuner[browser]'"
)
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason='no chromium on the PATH; on Debian: apt install chromium'),
]
