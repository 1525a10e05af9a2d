"""Translates configs in the classical format (`model = dict(type=SupervisedFinetune, ...)`) to the current one."""

from xtuner.config.classical.translate import is_classical, translate

__all__ = ['is_classical', 'translate']
