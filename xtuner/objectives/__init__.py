"""What training minimises, one file an objective."""

from xtuner.objectives.base import Objective, TargetRows

__all__ = ['Objective', 'TargetRows']
