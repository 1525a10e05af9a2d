"""The objective that a config names: a shipped one, a user's class, or a user's function on the target rows."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xtuner.config.short_types import OBJECTIVES
from xtuner.errors import ConfigError, nearest
from xtuner.objectives.base import Metrics, Objective, Statistics, TargetRows, check_methods, check_needs
from xtuner.registry import build, check_arguments, resolve

_OF_A_FUNCTION = ('needs', 'no_grad')


class FunctionObjective(Objective):
    """A function `loss(rows, **arguments)` that returns the summed loss, or the loss and a dict of metrics.

    Args:
        function: The user's.
        arguments: What the config gives it.
        needs: Names of `objectives.base.FIELDS`.
        no_grad: Those of them that the loss is not differentiated by.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], needs: list[str], no_grad: list[str]
    ) -> None:
        self.needs, self.no_grad = needs, no_grad
        self._loss = functools.partial(function, **arguments)
        self.name = getattr(function, '__name__', type(function).__name__)

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        """What the function returns."""
        found = self._loss(rows)
        return found if isinstance(found, tuple) else (found, {})


def make_objective(section: Any) -> Objective:
    """The objective of a config's `objective`.

    Args:
        section: 'sft'; 'module:name' or 'file.py:name'; or a dict of `type`, one of these or the class or function
            itself, and arguments. A function also takes `needs` and `no_grad` there; without them it gets `log_prob`.

    Raises:
        ConfigError: no such file or name, arguments or methods that do not fit, or `needs` that do not exist.
    """
    target, values = _resolved(section)
    if isinstance(target, type) and issubclass(target, Objective):
        for name in _OF_A_FUNCTION:
            if name in values and name not in inspect.signature(target).parameters:
                raise ConfigError(f'`objective.{name}` is for a function; set `{name}` in the class {target.__name__}')
        objective = build({'type': target, **values}, 'objective')
        check_methods(objective, 'objective')
    elif isinstance(target, type):
        raise ConfigError(
            f'`objective`: {target.__name__} is a class, but not a subclass of xtuner.objectives.Objective'
        )
    else:
        own = {name: values.pop(name) for name in _OF_A_FUNCTION if name in values}
        for name in values:
            if (hint := nearest(name, _OF_A_FUNCTION)) and name not in inspect.signature(target).parameters:
                raise ConfigError(f'unknown key `objective.{name}`{hint}')
        check_arguments({'type': target, **values}, 'objective', given=('rows',))
        objective = FunctionObjective(target, values, own.get('needs', ['log_prob']), own.get('no_grad', []))
    check_needs(objective, 'objective')
    return objective


def objective_code(section: Any) -> str | None:
    """A hash of the file that a user's objective is defined in, so that a resumed run notices an edit.

    Files that it imports are not looked at; versions of packages are recorded elsewhere.

    Returns:
        64 hexadecimal digits; None for a shipped objective, or one without a file.
    """
    kind = section.get('type') if isinstance(section, Mapping) else section
    if isinstance(kind, str) and kind in OBJECTIVES:
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(_resolved(section)[0])).read_bytes()).hexdigest()
    except (TypeError, OSError):  # a built-in, or typed at a prompt
        return None


def _resolved(section: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or function that a section names, and its arguments."""
    values = dict(section) if isinstance(section, Mapping) else {'type': section}
    kind = values.pop('type', None)
    return resolve(OBJECTIVES.get(kind, kind) if isinstance(kind, str) else kind), values
