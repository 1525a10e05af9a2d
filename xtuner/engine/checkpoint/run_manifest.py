"""What makes a run the same run: its config, data, base and processes, kept with each checkpoint as `run.json`.

A run that goes on under other settings than it began with ends with other weights than either would alone. So what
differs is named, field by field, and refused unless the user allows it.
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
from xtuner.utils.files import read_object

RUN_FILE = 'run.json'
FORMAT = 2
"""Of `run.json`. In runs of format 1, which name none, `Plan.float_products` holds."""
# Packages whose change may change the last bits.
_PACKAGES = ('torch', 'transformers', 'peft', 'bitsandbytes')
# Fields that change nothing in the weights, or whose effect another entry stands for: the base's fingerprint for its
# path, the data's digest for where it came from.
RESUMABLE_FIELDS = (
    'model.path', 'model.revision', 'model.trust_remote_code', 'model.dtype', 'dataset.cache_dir', 'checkpoint.',
    'log.', 'samples.', 'runtime.num_workers', 'runtime.max_nonfinite_steps', 'runtime.check_memory', 'parallel.',
)  # fmt: skip
_OF_THE_DATA = tuple(f'dataset.{name}' for name in (
    'source', 'map_fn', 'ignore', 'on_bad_record', 'max_dropped', 'val_ratio', 'val_file', 'unique_id'))  # fmt: skip
# What a checkpoint brings with it, so that the config's value would be ignored.
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
) -> dict[str, Any]:
    """The content of `run.json`: its format, under `run` what must stay as it is, under `versions` what had better.

    Args:
        config: The run's config.
        base_fingerprint: Of the base's weights.
        data_digest: Of the prepared conversations and their packs.
        compute_dtype: 'bf16', 'fp16' or 'fp32', after 'auto' was decided.
        device: Kind of device: 'cuda' with the GPU's name, or 'cpu'.
        num_groups: Groups of processes that read different items.
        world_size: Number of processes.
        formats: The format that was detected in each source; a run that goes on keeps it.
    """
    schedule = config.schedule
    run = _flat(vars(config), '')
    run |= {'base weights': base_fingerprint, 'data': data_digest, 'compute dtype': compute_dtype,
            'items a step': schedule.batch_size * schedule.accumulative_counts * num_groups,
            'number of processes': world_size}  # fmt: skip
    versions = {'xtuner': __version__, 'python': platform.python_version(), 'device': device}
    content = {'format': FORMAT, 'run': run, 'versions': versions | _versions(), 'formats': dict(formats)}
    return json.loads(json.dumps(content, default=_text))


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `run.json` into a checkpoint's folder."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / RUN_FILE).write_text(text + '\n', encoding='utf-8')


def recorded_formats(checkpoint: Path) -> dict[str, str] | None:
    """The format that was detected in each source as a checkpoint's run began; None where that is not recorded.

    Checkpoints of the first releases leave it to `about.json` in the work folder.
    """
    run, about = (_json(file) for file in (checkpoint / RUN_FILE, checkpoint.resolve().parent / 'about.json'))
    if isinstance(run.get('formats'), dict):
        return run['formats']
    parts = about.get('dataset')
    summaries = [part for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
    found = [part['formats'] for part in summaries if isinstance(part.get('formats'), dict)]
    return {str(name): str(text) for one in found for name, text in one.items()} if found else None


def recorded_setting(checkpoint: Path, name: str) -> Any:
    """A setting of a checkpoint's run, such as `dataset.packing`; None where it is not recorded."""
    run = _json(checkpoint / RUN_FILE).get('run')
    return run.get(name) if isinstance(run, dict) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, CheckpointError)
    except CheckpointError:  # `check_same_run` says what is wrong with a checkpoint
        return {}


def check_same_run(folder: Path, now: Mapping[str, Any], *, allow_changes: bool) -> list[str]:
    """Compares a checkpoint's run with the one that is to go on from it.

    Args:
        folder: The checkpoint.
        now: What `describe_run` says of the new run.
        allow_changes: Whether differences are only told.

    Returns:
        What differs all the same, for the log: changes that were allowed, and versions.

    Raises:
        CheckpointError: something differs and is not allowed, or cannot be changed within a run at all.
    """
    _, run_then, versions_then = _read_run(folder)
    changes = _changes(run_then, now['run'])
    fixed = [
        text for name, text in changes.items() if name.split('.')[0] in IMMUTABLE_FIELDS or name in IMMUTABLE_FIELDS
    ]
    if fixed:
        raise CheckpointError(
            f'{folder}: cannot resume, {"; ".join(fixed)}: that cannot change within a run; put it back, or begin a '
            'new run with --start-from'
        )
    if changes and not allow_changes:
        raise CheckpointError(
            f'{folder}: cannot resume exactly, {"; ".join(changes.values())}; put it back, add --allow-changes to go '
            'on all the same, or begin a new run with --start-from'
        )
    return [*changes.values(), *_changes(versions_then, now['versions']).values()]


def format_of_run(folder: Path) -> int:
    """The format of a checkpoint's `run.json`, which its run keeps.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    return _read_run(folder)[0]


def _read_run(folder: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    try:
        then = read_object(folder / RUN_FILE, CheckpointError)
        return int(then.get('format', 1)), dict(then['run']), dict(then['versions'])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f'{folder}: cannot resume, {RUN_FILE} does not tell its run ({error}); --start-from takes its weights'
        ) from error


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """By name, a text for each entry that differs and counts."""
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if 'data' not in names:  # the same conversations, wherever they came from
        names = [name for name in names if not name.startswith(_OF_THE_DATA)]
    counted = [name for name in names if not name.startswith(RESUMABLE_FIELDS)]
    if now.get('dataset.streaming') and 'runtime.num_workers' in names:  # they take turns in the stream
        counted.append('runtime.num_workers')
    return {name: _difference(name, then.get(name), now.get(name)) for name in counted}


def _difference(name: str, then: Any, now: Any) -> str:
    if name in ('data', 'base weights'):
        what = 'conversations or their packs' if name == 'data' else 'weights of the base model'
        return f'the {what} are not the same ({str(then)[:12]} then, {str(now)[:12]} now)'
    if name == 'items a step' and then:  # the data goes on at steps done x items a step
        fate = 'left out' if now > then else 'read again'
        return f'the {name} were {then} and are now {now}: {abs(now - then)} for each step done are {fate}'
    if name == 'dataset.ignore' and then is None:
        return ('this may be because the run began with an earlier release, which did not read fields that are used '
                'now, such as `system` and `history` (`dataset.ignore` leaves them out), but did read files of a '
                'folder that are left out now: test*, val*, hidden ones (name them in `dataset.source`)')  # fmt: skip
    shown = f'`{name}`' if '.' in name or name in ('adapter', 'quantization', 'hooks') else f'the {name}'
    return f'{shown} was {_short(then)} and is now {_short(now)}'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def _flat(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested sections as one level: `{'adapter': {'r': 8}}` gives `{'adapter.r': 8}`; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, section in values.items():
        name, value = f'{where}{key}', vars(section) if dataclasses.is_dataclass(section) else section
        flat |= _flat(value, f'{name}.') if isinstance(value, Mapping) and value else {name: value}
    return flat


def _text(value: Any) -> str:
    return reference(value) if callable(value) else repr(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
