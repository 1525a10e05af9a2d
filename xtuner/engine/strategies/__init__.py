"""How a run spreads over ranks: one class a strategy, one interface, and the table of what goes with what."""

from xtuner.engine.strategies.base import Single, Strategy
from xtuner.engine.strategies.choose import choose_strategy, make_strategy

__all__ = ['Single', 'Strategy', 'choose_strategy', 'make_strategy']
