"""Where a run starts: from scratch, exactly where another one stopped, or from another run's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.flatten import flatten
from xtuner.config.schema import TrainConfig
from xtuner.engine.checkpoint.run_lock import exclusive_run_dir
from xtuner.engine.checkpoint.run_manifest import check_same_run
from xtuner.engine.checkpoint.store import (
    MANIFEST_FILE,
    clear_leftovers,
    list_checkpoints,
    newest_checkpoint,
    point_to_checkpoints,
    recover,
    step_of,
    verify_checkpoint,
)
from xtuner.errors import CheckpointError, ConfigError, UsageError
from xtuner.model.run_folder import ADAPTER_CONFIG, resolve_checkpoint
from xtuner.registry import build

logger = logging.getLogger('xtuner')

NEWEST = 'newest'
"""Value of `ResumeOptions.resume`: the newest complete checkpoint in the work folder, or a new run if there is none."""


@dataclass(frozen=True)
class ResumeOptions:
    """How a run starts.

    Attributes:
        resume: None; `NEWEST`; or a checkpoint's folder to resume from exactly. A work folder, or its file `last`,
            stands for its last checkpoint, here and in `weights`.
        weights: A folder whose adapter (or full weights) a new run starts from; None: new weights.
        allow_changes: Whether a run may resume although config, data or processes changed.
    """

    resume: str | Path | None = None
    weights: Path | None = None
    allow_changes: bool = False

    def __post_init__(self) -> None:
        if self.resume is not None and self.weights is not None:
            raise UsageError('--resume continues a run and --start-from begins a new one; use one of them')
        if self.allow_changes and self.resume is None:
            raise UsageError('--allow-changes applies only to a resumed run; add --resume')
        if self.weights is not None:
            object.__setattr__(self, 'weights', resolve_checkpoint(self.weights))
        if self.resume not in (None, NEWEST):
            folder = resolve_checkpoint(Path(self.resume or ''))
            if (folder / ADAPTER_CONFIG).is_file() and not (folder / MANIFEST_FILE).is_file():
                raise CheckpointError(f"--resume {folder}: an adapter without the trainer's state cannot be resumed "
                                      'from; --start-from uses its weights')  # fmt: skip
            object.__setattr__(self, 'resume', folder)


NEW_RUN = ResumeOptions()


def check_start(work_dir: Path, start: ResumeOptions) -> None:
    """Checks the named folders before torch is imported.

    Raises:
        CheckpointError: The work folder has a run already and `--resume` is missing, or `--resume` or `--start-from`
            names a missing folder or something other than a checkpoint.
    """
    if start.weights is not None and not start.weights.is_dir():
        raise CheckpointError(f'--start-from {start.weights}: no such folder{_suggestion(start.weights.parent)}')
    if isinstance(start.resume, Path) or start.resume not in (None, NEWEST):
        folder = Path(start.resume or '')
        if folder.suffix == '.pth':
            raise CheckpointError(f'--resume {folder}: a checkpoint of classical xtuner cannot be resumed '
                                  'here; `xtuner convert pth_to_hf CONFIG FILE OUT` converts it to an adapter, and '
                                  '--start-from OUT begins a new run from it')  # fmt: skip
        if not folder.is_dir():
            raise CheckpointError(f'--resume {folder}: no such folder{_suggestion(work_dir)}')
        if list_checkpoints(folder):
            raise CheckpointError(f'--resume {folder}: that is a work folder, not a checkpoint{_suggestion(folder)}')
    if start.resume is None and list_checkpoints(work_dir):
        raise CheckpointError(
            f'{work_dir} already contains checkpoints; add --resume to continue that run, or choose another --work-dir'
        )


def check_work_dir(work_dir: Path) -> None:
    """Raises CheckpointError if the folder is not writable or has an active run; leaves no trace."""
    with exclusive_run_dir(work_dir):
        pass


def find_checkpoint(work_dir: Path, start: ResumeOptions, *, rank: int) -> Path | None:
    """Returns the checkpoint to resume from, the same on every rank; None for a new run.

    Raises:
        CheckpointError: As `check_start`, or the checkpoint is incomplete.
    """
    if rank == 0 and start.resume in (None, NEWEST) and work_dir.is_dir():
        _try_to_recover(work_dir)
    check_start(work_dir, start)
    if start.resume is None:
        return None
    if start.resume == NEWEST:
        return _newest_on_all_ranks(work_dir, rank)
    folder = Path(start.resume)
    verify_checkpoint(folder)
    _check_step_name(folder)
    return folder


def check_weights_folder(config: TrainConfig, folder: Path, base_fingerprint: str) -> None:
    """Checks what `--start-from` names before the base is loaded.

    Raises:
        CheckpointError: It is incomplete, or belongs to another base.
        ConfigError: The config's `adapter` differs from the one in the folder.
    """
    if (folder / MANIFEST_FILE).is_file():
        verify_checkpoint(folder)
    if config.adapter is None:
        return
    from xtuner.adapters.load import check_adapter
    from xtuner.adapters.settings import PROMPT_INIT, adapter_settings

    check_adapter(folder, base_fingerprint)
    saved, configured = adapter_settings(folder).to_dict(), build(config.adapter, 'adapter').to_dict()
    # 'all-linear' was replaced by a list of names when it was used.
    named = [key for key in config.adapter if key != 'type' and config.adapter[key] != 'all-linear']
    for key in ('peft_type', *(key for key in named if key not in PROMPT_INIT)):
        if _plain(saved.get(key)) != _plain(configured.get(key)):
            raise ConfigError(
                f'`adapter.{key}` is {configured.get(key)!r}, but {folder} was trained with {saved.get(key)!r}; '
                'set it to that, or start without --start-from'
            )


def check_resumable(
    checkpoint: Path, run: Mapping[str, Any], start: ResumeOptions, *, work_dir: Path, num_steps: int
) -> None:
    """Compares the run to be resumed with the one that wrote the checkpoint.

    Raises:
        CheckpointError: They differ, and that is not allowed.
    """
    changes = check_same_run(checkpoint, run, allow_changes=start.allow_changes)
    for text in changes:
        logger.warning('resuming despite a change: %s', text)
    if step_of(checkpoint) > num_steps:
        raise CheckpointError(
            f'{checkpoint} is at step {step_of(checkpoint)}, but this run has only {num_steps}; increase --max-steps'
        )
    later = [folder for folder in list_checkpoints(work_dir) if step_of(folder) > step_of(checkpoint)]
    if start.allow_changes and start.resume != NEWEST and later:
        raise CheckpointError(
            f'{work_dir} contains later checkpoints, up to {later[-1].name}, of the run before the changes; choose '
            'another --work-dir'
        )


def open_work_dir(work_dir: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Creates the work folder with the flat config, and removes leftovers of a killed run.

    Raises:
        CheckpointError: The folder is not writable.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(work_dir)
        (work_dir / 'config.py').write_text(flatten(config, title='The config of this run.'), encoding='utf-8')
        if checkpoint is not None and checkpoint.resolve().parent == work_dir.resolve():
            point_to_checkpoints(work_dir, step_of(checkpoint))
    except OSError as error:
        raise CheckpointError(f'cannot write to {work_dir}: {error.strerror}; choose another --work-dir') from error


def _newest_on_all_ranks(work_dir: Path, rank: int) -> Path | None:
    """The first rank searches and broadcasts the step: 0 for none, -1 if no checkpoint is complete."""
    import torch
    from mmengine.dist import broadcast

    step, failure, newest = torch.zeros(1, dtype=torch.int64), None, None
    if rank == 0:
        try:
            newest = newest_checkpoint(work_dir, warn=logger.warning)
            step[0] = step_of(newest) if newest else 0
        except CheckpointError as error:
            step[0], failure = -1, error
    broadcast(step)
    if failure is not None:
        raise failure
    if step.item() < 0:
        raise CheckpointError(f'{work_dir}: the first rank found no complete checkpoint')
    if step.item() == 0:
        if rank == 0:
            logger.info('%s contains no checkpoint yet: starting a new run', work_dir)
        return None
    return next(folder for folder in list_checkpoints(work_dir) if step_of(folder) == step.item())


def _try_to_recover(work_dir: Path) -> None:
    try:
        recover(work_dir)
    except OSError as error:
        raise CheckpointError(f'cannot write to {work_dir}: {error.strerror}; choose another --work-dir') from error


def _check_step_name(folder: Path) -> None:
    try:
        step_of(folder)
    except ValueError:
        raise CheckpointError(
            f'--resume {folder}: a checkpoint must be named checkpoint-STEP; restore its name, or use --start-from'
        ) from None


def _suggestion(work_dir: Path) -> str:
    folders = list_checkpoints(work_dir)
    return f'; did you mean {folders[-1]}?' if folders else ''


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set)) else value
