"""Configs in the classical form (`model = dict(type=SupervisedFinetune, ...)`), read as what they say in ours."""

from xtuner.config.classical.translate import is_classical, translate

__all__ = ['is_classical', 'translate']
