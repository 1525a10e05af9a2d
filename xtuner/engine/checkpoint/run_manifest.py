"""Identity of a run: its config, data, base and processes, saved with each checkpoint as `run.json`.

A run resumed with other settings ends with weights that neither setting would give. Differences are therefore listed
field by field, and rejected unless the user allows them.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xtuner import __version__
from xtuner.config.schema import TrainConfig
from xtuner.errors import CheckpointError
from xtuner.registry import reference
from xtuner.utils.fields import shown
from xtuner.utils.files import read_object

RUN_FILE = 'run.json'
FORMAT = 2
"""Format of `run.json`. Runs of format 1, which is not recorded, use `TrainingSchedule.float_products`."""
# Packages whose version may change the last bits.
_PACKAGES = ('torch', 'transformers', 'peft', 'bitsandbytes')
# Fields that do not change the weights, or that another entry stands for: the base's fingerprint for its path, the
# data's digest for its sources.
RESUMABLE_FIELDS = (
    'model.path', 'model.revision', 'model.trust_remote_code', 'model.dtype', 'dataset.cache_dir', 'checkpoint.',
    'log.', 'samples.', 'runtime.num_workers', 'runtime.max_nonfinite_steps', 'runtime.check_memory', 'parallel.',
)  # fmt: skip
_DATA_FIELDS = tuple(f'dataset.{name}' for name in (
    'source', 'map_fn', 'ignore', 'on_bad_record', 'max_dropped', 'val_ratio', 'val_file', 'unique_id'))  # fmt: skip
# Fields determined by the checkpoint, so that the config's value would be ignored.
IMMUTABLE_FIELDS = ('adapter', 'optimizer.type', 'base weights')


def describe_run(
    config: TrainConfig,
    *,
    base_fingerprint: str,
    data_digest: str,
    compute_dtype: str,
    device: str,
    num_groups: int,
    world_size: int,
    formats: Mapping[str, str],
    objective_code: str | None = None,
) -> dict[str, Any]:
    """Returns the content of `run.json`: its format, `run` with what must not change, `versions` with what should not.

    Args:
        config: The run's config.
        base_fingerprint: Fingerprint of the base's weights.
        data_digest: Digest of the prepared conversations and their packs.
        compute_dtype: 'bf16', 'fp16' or 'fp32', after resolving 'auto'.
        device: Device type: 'cuda' with the GPU's name, or 'cpu'.
        num_groups: Groups of processes that read different items.
        world_size: Number of processes.
        formats: The format detected in each source, which a resumed run keeps.
        objective_code: Hash of the file of a user's objective; None for a built-in one.
    """
    schedule = config.schedule
    run = _flat(vars(config), '')
    run |= {'base weights': base_fingerprint, 'data': data_digest, 'compute dtype': compute_dtype,
            'items a step': schedule.batch_size * schedule.accumulative_counts * num_groups,
            'number of processes': world_size}  # fmt: skip
    if objective_code is not None:
        run['objective code'] = objective_code
    versions = {'xtuner': __version__, 'python': platform.python_version(), 'device': device}
    content = {'format': FORMAT, 'run': run, 'versions': versions | _versions(), 'formats': dict(formats)}
    return json.loads(json.dumps(content, default=_text))


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `run.json` into a checkpoint."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / RUN_FILE).write_text(text + '\n', encoding='utf-8')


def recorded_formats(checkpoint: Path) -> dict[str, str] | None:
    """Returns the formats that were detected when a checkpoint's run began; None if not recorded.

    For checkpoints of the first releases they are in `about.json` in the work folder.
    """
    run, about = (_json(file) for file in (checkpoint / RUN_FILE, checkpoint.resolve().parent / 'about.json'))
    if isinstance(run.get('formats'), dict):
        return run['formats']
    parts = about.get('dataset')
    summaries = [part for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
    formats = [part['formats'] for part in summaries if isinstance(part.get('formats'), dict)]
    return {str(name): str(text) for one in formats for name, text in one.items()} if formats else None


def recorded_setting(checkpoint: Path, name: str) -> Any:
    """A setting of a checkpoint's run, such as `dataset.packing`; None where it is not recorded."""
    run = _json(checkpoint / RUN_FILE).get('run')
    return run.get(name) if isinstance(run, dict) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, CheckpointError)
    except CheckpointError:  # `check_same_run` reports what is wrong with a checkpoint
        return {}


def check_same_run(folder: Path, now: Mapping[str, Any], *, allow_changes: bool) -> list[str]:
    """Compares a checkpoint's run with the one that resumes from it.

    Args:
        folder: The checkpoint.
        now: The result of `describe_run` for the new run.
        allow_changes: Whether differences are only reported.

    Returns:
        Tolerated differences, for the log: allowed changes, and versions.

    Raises:
        CheckpointError: A difference is not allowed, or cannot change within a run at all.
    """
    _, run_then, versions_then = _read_run(folder)
    changes = _changes(_with_objective(run_then), now['run'])
    immutable = [
        text for name, text in changes.items() if name.split('.')[0] in IMMUTABLE_FIELDS or name in IMMUTABLE_FIELDS
    ]
    if immutable:
        raise CheckpointError(
            f'{folder}: cannot resume, {"; ".join(immutable)}: that cannot change within a run; restore it, or start a '
            'new run with --start-from'
        )
    if changes and not allow_changes:
        raise CheckpointError(
            f'{folder}: cannot resume exactly, {"; ".join(changes.values())}; restore it, add --allow-changes to '
            'resume anyway, or start a new run with --start-from'
        )
    return [*changes.values(), *_changes(versions_then, now['versions']).values()]


def _with_objective(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the objective to a recorded run; earlier releases had only one, and did not record it."""
    named = any(name == 'objective' or name.startswith('objective.') for name in run)
    return run if named else {**run, 'objective': 'sft'}


def format_of_run(folder: Path) -> int:
    """Returns the format of a checkpoint's `run.json`, which its run keeps.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return _read_run(folder)[0]


def _read_run(folder: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    try:
        then = read_object(folder / RUN_FILE, CheckpointError)
        return int(then.get('format', 1)), dict(then['run']), dict(then['versions'])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f'{folder}: cannot resume, {RUN_FILE} is invalid ({error}); --start-from uses its weights'
        ) from error


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describes each relevant difference, by name."""
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if 'data' not in names:  # same conversations, whatever their sources
        names = [name for name in names if not name.startswith(_DATA_FIELDS)]
    relevant = [name for name in names if not name.startswith(RESUMABLE_FIELDS)]
    if now.get('dataset.streaming') and 'runtime.num_workers' in names:  # workers take turns in the stream
        relevant.append('runtime.num_workers')
    return {name: _difference(name, then.get(name), now.get(name)) for name in relevant}


_HASHED = {'data': 'conversations or their packs', 'base weights': 'weights of the base model',
         'objective code': "contents of the objective's file"}  # fmt: skip


def _difference(name: str, then: Any, now: Any) -> str:
    if name in _HASHED and then is not None and now is not None:
        return f'the {_HASHED[name]} differ ({str(then)[:12]} then, {str(now)[:12]} now)'
    if name == 'items a step' and then:  # the data continues at completed steps x items per step
        fate = 'skipped' if now > then else 'read again'
        return f'the {name} were {then} and are now {now}: {abs(now - then)} for each completed step are {fate}'
    if name == 'dataset.ignore' and then is None:
        return ('the run may have begun with an earlier release, which did not read fields that are read '
                'now, such as `system` and `history` (ignore them with `dataset.ignore`), but did read files of a '
                'folder that are skipped now: test*, val*, hidden ones (name them in `dataset.source`)')  # fmt: skip
    sections = ('adapter', 'objective', 'quantization', 'hooks')
    name_text = f'`{name}`' if '.' in name or name in sections else f'the {name}'
    return f'{name_text} was {shown(then)} and is now {shown(now)}'


def _flat(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flattens nested sections: `{'adapter': {'r': 8}}` gives `{'adapter.r': 8}`; lists are kept."""
    flat: dict[str, Any] = {}
    for key, section in values.items():
        name, value = f'{where}{key}', vars(section) if dataclasses.is_dataclass(section) else section
        flat |= _flat(value, f'{name}.') if isinstance(value, Mapping) and value else {name: value}
    return flat


def _text(value: Any) -> str:
    return reference(value) if callable(value) else repr(value)


def _versions() -> dict[str, str]:
    result = {}
    for name in _PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result
