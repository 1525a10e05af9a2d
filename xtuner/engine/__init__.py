"""Training: runner, loop, hooks, checkpoints and distributed strategies."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
