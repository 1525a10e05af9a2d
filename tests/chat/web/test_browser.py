"""The page in a real Chromium: streaming, stop, clear, tabs, side by side, and answers that mean harm.

Slow, and skipped where Playwright or a Chromium is missing; both can be had without a download of ours:
`pip install -e '.[browser]'` and the platform's own package, such as Debian's `chromium`.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytest.importorskip('streamlit', reason="the page needs Streamlit: pip install 'xtuner[web]'")
from tests.browser import CHROMIUM, MARKS, playwright

pytestmark = MARKS
TITLE = 'tiny · xtuner'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@contextmanager
def served(*command: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """The page's process, once it answers."""
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/_stcore/health', timeout=5)
                break
            except OSError:
                assert process.poll() is None, process.stdout and process.stdout.read()
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def outside() -> Iterator[Any]:
    """Another origin: a server that notes what is asked of it."""

    class Notes(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Notes)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope='module')
def address(outside: Any) -> Iterator[str]:
    """The page over a scripted model that says some thirty words a second."""
    port = free_port()
    command = [sys.executable, '-m', 'tests.chat.web.scripted', str(port), f'http://127.0.0.1:{outside.server_port}']
    with served(*command, port=port) as process:
        yield f'http://127.0.0.1:{port}'
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
        assert 'reached for' not in output
        assert 'Traceback' not in output


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    """A Chromium that can reach this machine only."""
    arguments = ['--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Tab:
    """One tab on the page, and every request that it made."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_page(viewport={'width': 1200, 'height': 900})
        self.requests: list[str] = []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.box.wait_for(timeout=30_000)

    @property
    def box(self) -> Any:
        return self.page.get_by_test_id('stChatInputTextArea')

    @property
    def bubbles(self) -> Any:
        return self.page.get_by_test_id('stChatMessage')

    @property
    def last_answer(self) -> str:
        return '\n'.join(self.bubbles.last.get_by_test_id('stMarkdownContainer').all_inner_texts())

    def button(self, name: str) -> Any:
        return self.page.get_by_role('button', name=re.compile(name))

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press('Enter')

    def ask(self, text: str) -> str:
        """The answer, when it is whole."""
        num_bubbles = self.bubbles.count()
        self.say(text)
        playwright.expect(self.bubbles).to_have_count(num_bubbles + 2, timeout=20_000)
        playwright.expect(self.button('Stop')).to_have_count(0, timeout=30_000)
        playwright.expect(self.box).to_be_enabled()
        return self.last_answer


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.page.close()


def numbers(bubble: Any) -> list[str]:
    return re.findall(r'\d+', bubble.inner_text())


def test_two_turns_stream_and_clear_forgets_them(tab: Tab) -> None:
    assert tab.page.title() == TITLE
    assert tab.ask('one') == 'You said one.'
    tab.say('count 30')
    tab.page.get_by_text(re.compile('1 2 3')).wait_for()
    assert len(numbers(tab.bubbles.last)) < 30  # it comes word by word
    playwright.expect(tab.button('Stop')).to_have_count(0, timeout=20_000)
    assert numbers(tab.bubbles.last)[-1] == '30'
    assert "'Be kind.' 4 before" in tab.ask('settings')
    tab.button('Clear').click()
    playwright.expect(tab.bubbles).to_have_count(0)
    assert "'Be kind.' 0 before" in tab.ask('settings')


def test_stop_ends_the_answer_within_a_word(tab: Tab) -> None:
    tab.say('count 900')
    tab.page.get_by_text(re.compile('8 9 10')).wait_for()
    tab.button('Stop').click()
    tab.page.get_by_text('Stopped.').wait_for(timeout=3_000)
    shown = numbers(tab.bubbles.last)
    assert 10 <= len(shown) < 60  # the click itself takes its time
    assert tab.ask('how many?') == f'The last answer had {len(shown)} words.'
    assert numbers(tab.bubbles.nth(1)) == shown  # what was said stays


def test_clear_in_the_middle_of_an_answer_ends_it(tab: Tab) -> None:
    tab.ask('one')
    tab.say('count 900')
    tab.page.get_by_text(re.compile('8 9 10')).wait_for()
    tab.button('Clear').click()
    playwright.expect(tab.bubbles).to_have_count(0)
    assert int(re.findall(r'\d+', tab.ask('how many?'))[0]) < 100


def test_side_by_side(tab: Tab) -> None:
    tab.ask('one')
    tab.page.get_by_text('Side by side').click()
    tab.page.wait_for_timeout(500)
    tab.ask('two')
    columns = tab.bubbles.last.get_by_test_id('stColumn')
    assert [columns.nth(i).inner_text().split('\n')[-1] for i in range(2)] == ['Base: You said two.', 'You said two.']
    left, right = (columns.nth(i).bounding_box() for i in range(2))
    assert left['x'] + left['width'] <= right['x']
    assert left['y'] == right['y']


def test_two_tabs_take_turns_and_a_closed_tab_makes_room(browser: Any, address: str, tab: Tab) -> None:
    other = Tab(browser, address)
    other.say('count 900')
    other.page.get_by_text(re.compile('8 9 10')).wait_for()
    tab.say('one')
    tab.page.get_by_text('Waiting: the model is answering in another tab.').wait_for()
    assert numbers(other.bubbles.last)[:10] == [str(i) for i in range(1, 11)]
    other.page.close()
    tab.page.get_by_text('You said one.').wait_for(timeout=5_000)
    assert tab.ask('together') == 'At most 1 spoke at once.'


def test_a_waiting_tab_can_give_up(browser: Any, address: str, tab: Tab) -> None:
    other = Tab(browser, address)
    other.say('count 900')
    other.page.get_by_text(re.compile('1 2')).wait_for()
    tab.say('one')
    tab.page.get_by_text('Waiting: the model').wait_for()
    tab.button('Stop').click()
    tab.page.get_by_text('Stopped.').wait_for(timeout=3_000)
    other.button('Stop').click()
    other.page.get_by_text('Stopped.').wait_for(timeout=3_000)
    other.page.close()


def test_an_answer_that_means_harm_is_drawn_as_text(tab: Tab, outside: Any) -> None:
    tab.page.on('dialog', lambda dialog: pytest.fail(f'a dialog opened: {dialog.message}'))
    shown = tab.ask('danger')
    tab.page.wait_for_timeout(1_000)
    answer = tab.bubbles.last
    assert "<script>document.title = 'taken over'</script>" in shown
    assert '<b>bold?</b>' in shown
    for tag in ('script', 'iframe', 'object', 'embed', 'form', 'b'):
        assert answer.locator(tag).count() == 0, tag
    links = [link.get_attribute('href') or '' for link in answer.locator('a').all()]
    assert {link.rsplit('/', 1)[-1] for link in links} == {'page', 'picture.png', 'reference.png', 'twice.png'}
    assert all(link.startswith('http:') for link in links)
    assert tab.page.title() == TITLE
    assert answer.locator('.katex').count() == 3
    assert 'graph LR; A[' in shown
    assert 'It costs $5 or $6.' in shown
    assert 'print("<script>code</script>")' in shown
    assert '![not a picture]' in shown  # in a block of code
    elsewhere = [url for url in tab.requests if url.startswith(f'http://127.0.0.1:{outside.server_port}')]
    assert {url.rsplit('/', 1)[1] for url in elsewhere} <= {
        'slipped.png'
    }  # what is asked for there, the policy refuses
    assert outside.asked == []


def test_nothing_is_fetched_from_elsewhere(tab: Tab, address: str) -> None:
    tab.ask('one')
    tab.page.get_by_text('Side by side').hover()
    tab.page.wait_for_timeout(2_000)
    assert [url for url in tab.requests if not url.startswith((address, 'data:', 'blob:'))] == []


@pytest.mark.parametrize('origin', ['http://elsewhere.example', 'http://127.0.0.1:1', 'null'])
def test_another_page_cannot_talk_to_this_one(address: str, origin: str) -> None:
    from websockets import Origin, Subprotocol
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    stream = address.replace('http', 'ws', 1) + '/_stcore/stream'
    with connect(stream, origin=Origin(address), subprotocols=[Subprotocol('streamlit')]):
        pass
    with pytest.raises(InvalidStatus, match='403'):
        connect(stream, origin=Origin(origin), subprotocols=[Subprotocol('streamlit')])
    request = urllib.request.Request(address, headers={'Origin': origin})
    with pytest.raises(urllib.error.HTTPError, match='403'):
        urllib.request.urlopen(request, timeout=5)


def test_the_conversation_can_be_saved(tab: Tab) -> None:
    tab.ask('one')
    with tab.page.expect_download() as download:
        tab.button('Save').click()
    assert download.value.suggested_filename == 'conversation.jsonl'
    record = json.loads(Path(download.value.path()).read_text(encoding='utf-8'))
    assert [message['role'] for message in record['messages']] == ['system', 'user', 'assistant']


def test_a_real_model_by_the_command_and_by_streamlit_run(browser: Any, tiny_internlm: Path) -> None:
    """Starts as a user would, two turns, and ends by Ctrl-C without a traceback."""
    words = [str(tiny_internlm), '--prompt-template', 'internlm_chat', '--temperature', '0', '--max-new-tokens', '40']
    port = free_port()
    commands = [  # and the status after Ctrl-C, which Streamlit's own command says in its own way
        ('-m xtuner.cli.main chat', [*words, '--web', '--port', str(port)], (0,)),
        (f'-m streamlit run tools/web_demo.py --server.port {port} --', words, (0, 1)),
    ]
    answers = []
    for command, rest, statuses in commands:
        with served(sys.executable, *command.split(), *rest, port=port) as process:
            assert listening(port) == {'127.0.0.1'}
            tab = Tab(browser, f'http://127.0.0.1:{port}')
            answers.append([tab.ask('Hello'), tab.ask('And now?')])
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
            assert process.returncode in statuses, output
            assert 'Traceback' not in output
            assert 'statistics' not in output.lower()
            tab.page.close()
    assert answers[0] == answers[1]
    assert all(answer for answer in answers[0])


def listening(port: int) -> set[str]:
    """The addresses on which something listens at a port."""
    import psutil

    found = (c.laddr for c in psutil.net_connections('tcp') if c.status == psutil.CONN_LISTEN)
    return {address.ip for address in found if address.port == port}


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (['no/such-model-here'], 1, 'xtuner: error: '),
        (['x', '--temperature', '-1'], 2, '--temperature: must be 0 or more'),
    ],
)
def test_streamlit_run_says_what_is_wrong_in_one_line(arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, '-m', 'streamlit', 'run', 'tools/web_demo.py', '--server.port', str(free_port()), '--']
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
