"""How a run spreads over ranks: one class a strategy, one interface, and the table of what goes with what."""

from xtuner.engine.distributed.base import Single, Strategy
from xtuner.engine.distributed.choose import choose_strategy, make_strategy

__all__ = ['Single', 'Strategy', 'choose_strategy', 'make_strategy']
