"""Addresses that a service binds to."""

from __future__ import annotations

from xtuner.cli.serve import is_loopback


def test_which_addresses_are_this_machine_alone() -> None:
    assert [is_loopback(h) for h in ('localhost', '127.0.0.1', '127.0.0.2', '::1')] == [True] * 4
    assert [is_loopback(h) for h in ('0.0.0.0', '::', '192.168.1.1', 'example.com', '')] == [False] * 5
