"""Where a run begins: anew, exactly where another was stopped, or anew with another's weights."""

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
"""Sentinel for `Start.resume`: the newest whole checkpoint in the work folder, or a new run where there is none."""


@dataclass(frozen=True)
class ResumeOptions:
    """How the user wants a run to begin.

    Attributes:
        resume: None; `NEWEST`; or a checkpoint's folder, to go on exactly from there. A work folder, or the file `last`
            in it, stands for its last checkpoint, here and in `weights`.
        weights: A folder whose adapter (or whole weights) a new run begins with; None: new ones.
        allow_changes: Whether a run may go on although config, data or processes have changed.
    """

    resume: str | Path | None = None
    weights: Path | None = None
    allow_changes: bool = False

    def __post_init__(self) -> None:
        if self.resume is not None and self.weights is not None:
            raise UsageError('--resume goes on with a run and --start-from begins a new one; give one of them')
        if self.allow_changes and self.resume is None:
            raise UsageError('--allow-changes is for a run that goes on; add --resume')
        if self.weights is not None:
            object.__setattr__(self, 'weights', resolve_checkpoint(self.weights))
        if self.resume not in (None, NEWEST):
            folder = resolve_checkpoint(Path(self.resume or ''))
            if (folder / ADAPTER_CONFIG).is_file() and not (folder / MANIFEST_FILE).is_file():
                raise CheckpointError(f"--resume {folder}: an adapter without the trainer's state, so no run can go on "
                                      'from it; --start-from takes its weights')  # fmt: skip
            object.__setattr__(self, 'resume', folder)


NEW_RUN = ResumeOptions()


def check_start(work_dir: Path, start: ResumeOptions) -> None:
    """Refuses what the names of folders tell already, before torch is imported.

    Raises:
        CheckpointError: there is a run already and nothing was said of it, or what `--resume` or `--start-from` names
            is no folder, or no checkpoint.
    """
    if start.weights is not None and not start.weights.is_dir():
        raise CheckpointError(f'--start-from {start.weights}: no such folder{_offer(start.weights.parent)}')
    if isinstance(start.resume, Path) or start.resume not in (None, NEWEST):
        folder = Path(start.resume or '')
        if folder.suffix == '.pth':
            raise CheckpointError(f'--resume {folder}: a checkpoint of classical xtuner holds no state to go on from '
                                  'here; `xtuner convert pth_to_hf CONFIG FILE OUT` makes an adapter of it, and '
                                  '--start-from OUT begins a new run with that')  # fmt: skip
        if not folder.is_dir():
            raise CheckpointError(f'--resume {folder}: no such folder{_offer(work_dir)}')
        if list_checkpoints(folder):
            raise CheckpointError(f'--resume {folder}: that is a work folder, not a checkpoint{_offer(folder)}')
    if start.resume is None and list_checkpoints(work_dir):
        raise CheckpointError(
            f'{work_dir} already holds checkpoints; add --resume to go on with that run, or give another --work-dir'
        )


def check_work_dir(work_dir: Path) -> None:
    """Raises CheckpointError where nothing can be written to the folder, or a run is under way; leaves no trace."""
    with exclusive_run_dir(work_dir):
        pass


def find_checkpoint(work_dir: Path, start: ResumeOptions, *, rank: int) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None for a new run.

    Raises:
        CheckpointError: as `check_start`, or the checkpoint is not whole.
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
    """Looks at what `--start-from` names before the base is loaded.

    Raises:
        CheckpointError: not whole, or of another base.
        ConfigError: the config's `adapter` is of another form than the one in the folder.
    """
    if (folder / MANIFEST_FILE).is_file():
        verify_checkpoint(folder)
    if config.adapter is None:
        return
    from xtuner.adapters.load import check_adapter
    from xtuner.adapters.settings import PROMPT_INIT, adapter_settings

    check_adapter(folder, base_fingerprint)
    saved, wanted = adapter_settings(folder).to_dict(), build(config.adapter, 'adapter').to_dict()
    # 'all-linear' has become a list of names where it was used.
    named = [key for key in config.adapter if key != 'type' and config.adapter[key] != 'all-linear']
    for key in ('peft_type', *(key for key in named if key not in PROMPT_INIT)):
        if _plain(saved.get(key)) != _plain(wanted.get(key)):
            raise ConfigError(
                f'`adapter.{key}` is {wanted.get(key)!r}, and {folder} was trained with {saved.get(key)!r}; '
                'set it to that, or begin without --start-from'
            )


def check_resumable(
    checkpoint: Path, run: Mapping[str, Any], start: ResumeOptions, *, work_dir: Path, num_steps: int
) -> None:
    """Compares the run that is to go on with the one that wrote the checkpoint.

    Raises:
        CheckpointError: they differ, and that is not allowed.
    """
    told = check_same_run(checkpoint, run, allow_changes=start.allow_changes)
    for text in told:
        logger.warning('going on although %s', text)
    if step_of(checkpoint) > num_steps:
        raise CheckpointError(
            f'{checkpoint} is at step {step_of(checkpoint)}, and this run has only {num_steps}; raise --max-steps'
        )
    later = [folder for folder in list_checkpoints(work_dir) if step_of(folder) > step_of(checkpoint)]
    if start.allow_changes and start.resume != NEWEST and later:
        raise CheckpointError(
            f'{work_dir} holds later checkpoints, up to {later[-1].name}, of the run before the changes; give another '
            '--work-dir'
        )


def open_work_dir(work_dir: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Makes the work folder, with the flat config in it, and clears away what a killed run left.

    Raises:
        CheckpointError: nothing can be written there.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(work_dir)
        (work_dir / 'config.py').write_text(flatten(config, title='The config of this run.'), encoding='utf-8')
        if checkpoint is not None and checkpoint.resolve().parent == work_dir.resolve():
            point_to_checkpoints(work_dir, step_of(checkpoint))
    except OSError as error:
        raise CheckpointError(f'cannot write to {work_dir}: {error.strerror}; give another --work-dir') from error


def _newest_on_all_ranks(work_dir: Path, rank: int) -> Path | None:
    """The first rank looks, and tells the step: 0 for none, -1 where it found no whole one."""
    import torch
    from mmengine.dist import broadcast

    step, failure, found = torch.zeros(1, dtype=torch.int64), None, None
    if rank == 0:
        try:
            found = newest_checkpoint(work_dir, warn=logger.warning)
            step[0] = step_of(found) if found else 0
        except CheckpointError as error:
            step[0], failure = -1, error
    broadcast(step)
    if failure is not None:
        raise failure
    if step.item() < 0:
        raise CheckpointError(f'{work_dir}: the first process found no whole checkpoint')
    if step.item() == 0:
        if rank == 0:
            logger.info('%s holds no checkpoint yet: a new run begins', work_dir)
        return None
    return next(folder for folder in list_checkpoints(work_dir) if step_of(folder) == step.item())


def _try_to_recover(work_dir: Path) -> None:
    try:
        recover(work_dir)
    except OSError as error:
        raise CheckpointError(f'cannot write to {work_dir}: {error.strerror}; give another --work-dir') from error


def _check_step_name(folder: Path) -> None:
    try:
        step_of(folder)
    except ValueError:
        raise CheckpointError(
            f'--resume {folder}: a checkpoint is called checkpoint-STEP; give it its name back, or --start-from it'
        ) from None


def _offer(work_dir: Path) -> str:
    folders = list_checkpoints(work_dir)
    return f'; did you mean {folders[-1]}?' if folders else ''


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set)) else value
