"""Distributed strategies: one class per strategy, a common interface, and the table of allowed combinations."""

from xtuner.engine.distributed.base import Single, Strategy
from xtuner.engine.distributed.choose import choose_strategy, make_strategy

__all__ = ['Single', 'Strategy', 'choose_strategy', 'make_strategy']
