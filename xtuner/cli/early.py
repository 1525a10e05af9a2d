"""What a command can refuse before torch and transformers are imported: paths that are not there, folders in use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from xtuner.config.schema import TrainConfig
from xtuner.errors import CheckpointError
from xtuner.ranks import CHILD, is_first_process

logger = logging.getLogger('xtuner')


def say_loading() -> None:
    """The first line of a command that loads a model: what it waits for, before the imports that take seconds."""
    if CHILD not in os.environ:  # the process that started this one has said it
        logger.info('loading PyTorch and transformers ...')


def check_model(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Looks for a model; of one on the hub, config and tokenizer are fetched, by the first process alone.

    Raises:
        ModelError: nothing there under that name.
    """
    from xtuner.model.hub import MODELSCOPE, resolve_model

    if not path.startswith(MODELSCOPE) and is_first_process():
        resolve_model(path, revision=revision, trust_remote_code=trust_remote_code, weights=False)


def check_adapters(*paths: Path) -> None:
    """Raises CheckpointError where one of the paths does not exist; what is in them is looked at when they are read."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f'{path}: no adapter found (no such file or folder)')


def check_config(config: TrainConfig, *, data: bool = True) -> None:
    """Looks for what a config names.

    Args:
        config: A checked config.
        data: Whether its data is looked for too.

    Raises:
        ModelError: there is no such model.
        DataError: there is no such file or folder of data.
    """
    from xtuner.dataset.sources.source import check_local

    model = config.model
    check_model(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    for spec in (config.dataset.source, config.dataset.val_file) if data else ():
        check_local(spec)
