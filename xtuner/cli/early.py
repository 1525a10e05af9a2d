"""Checks that run before torch and transformers are imported: missing models, adapters and data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from xtuner.config.schema import TrainConfig
from xtuner.errors import CheckpointError
from xtuner.ranks import CHILD, is_first_process

logger = logging.getLogger('xtuner')


def say_loading() -> None:
    """Logs that libraries are being loaded, before the imports that take seconds."""
    if CHILD not in os.environ:  # the parent process has logged it
        logger.info('loading PyTorch and transformers ...')


def check_model(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Checks that a model exists. The first process downloads the config and tokenizer of a hub model.

    Raises:
        ModelError: there is no model of that name.
    """
    from xtuner.model.hub import MODELSCOPE, resolve_model

    if not path.startswith(MODELSCOPE) and is_first_process():
        resolve_model(path, revision=revision, trust_remote_code=trust_remote_code, weights=False)


def check_adapters(*paths: Path) -> None:
    """Raises CheckpointError if one of the paths does not exist. Contents are checked when they are read."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f'{path}: no adapter found (no such file or folder)')


def check_objective(config: TrainConfig) -> None:
    """Checks an objective of one's own as training does; imports torch for one that is not a shipped one's name.

    Raises:
        ConfigError: its file, name, arguments, methods or `needs` are wrong.
    """
    from xtuner.config.short_types import OBJECTIVES

    if not (isinstance(config.objective, str) and config.objective in OBJECTIVES):
        from xtuner.objectives.load import make_objective

        make_objective(config.objective)


def check_config(config: TrainConfig, *, data: bool = True) -> None:
    """Checks that the model and data of a config exist.

    Args:
        config: A checked config.
        data: Whether to check the data as well.

    Raises:
        ModelError: there is no such model.
        DataError: there is no such file or folder of data.
    """
    from xtuner.dataset.sources.source import check_local

    model = config.model
    check_model(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    for spec in (config.dataset.source, config.dataset.val_file) if data else ():
        check_local(spec)
