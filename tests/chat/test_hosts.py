"""Names in the header `Host`."""

from __future__ import annotations

import pytest

from xtuner.chat.hosts import LOOPBACK, host_name, is_allowed_host

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(('header', 'name'), [
    ('localhost', 'localhost'), ('LocalHost:8501', 'localhost'), ('127.0.0.1:80', '127.0.0.1'), ('[::1]:80', '::1'),
    ('[::1]', '::1'), ('evil.example:8501', 'evil.example'), ('', ''),
])  # fmt: skip
def test_the_name_in_a_header(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize('header', [
    '', ':8501', 'evil.example', 'localhost.evil.example', 'evil.example:localhost', 'localhost@evil.example',
    '127.0.0.1.evil.example:80', '[::1].evil.example', '[evil.example]:80', '0.0.0.0', 'localhost, evil.example',
])  # fmt: skip
def test_what_is_not_this_machine(header: str) -> None:
    assert not is_allowed_host(header, LOOPBACK)


def test_what_is() -> None:
    for header in ('localhost', 'localhost:1', '127.0.0.1:8000', '[::1]:8000'):
        assert is_allowed_host(header, LOOPBACK)
