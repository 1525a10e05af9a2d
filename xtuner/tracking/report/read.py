"""Reads the files of a work folder into a `RecordedRun`, tolerating missing files and incomplete lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.errors import CheckpointError
from xtuner.tracking.files import METRICS_FILE, SAMPLES_FILE
from xtuner.tracking.sessions import ABOUT_FILE, read_about
from xtuner.utils.fields import Field, check_fields
from xtuner.utils.files import check_regular
from xtuner.utils.jsonl import objects

_DICT = Field(dict[str, Any] | None)
_ABOUT_FIELDS = {'sessions': Field(list[dict[str, Any]] | None), 'plan': _DICT, 'parameters': _DICT, 'dataset': _DICT}


@dataclass(frozen=True)
class Series:
    """One quantity over the steps; non-finite values are dropped and their steps recorded.

    Attributes:
        steps: Optimizer steps, ascending.
        values: One per step.
        broken: Steps with a non-finite value.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class RecordedRun:
    """Content of a work folder.

    Attributes:
        name: The folder's name.
        about: Content of `about.json`.
        metrics: Lines of `metrics.jsonl` about training steps, one per step.
        validation: Lines of `metrics.jsonl` with a validation loss.
        samples: Lines of `samples.jsonl`.
        config: Text of `config.py`.
        num_torn: Lines of either file that could not be read.
    """

    name: str
    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str
    num_torn: int

    def series(self, key: str) -> Series:
        """A quantity of the training steps."""
        return _series(self.metrics, key)

    @property
    def validation_loss(self) -> Series:
        """The validation loss."""
        return _series(self.validation, 'val_loss')


def read_run(work_dir: Path) -> RecordedRun:
    """Reads a work folder.

    Raises:
        CheckpointError: The folder is not a work folder: it has none of these files.
    """
    metrics, torn_metrics = _lines(work_dir / METRICS_FILE)
    samples, torn_samples = _lines(work_dir / SAMPLES_FILE)
    about = read_about(work_dir)
    check_fields(about, _ABOUT_FIELDS, work_dir / ABOUT_FILE, CheckpointError)
    if not work_dir.is_dir() or not (metrics or samples or about):
        raise CheckpointError(f'{work_dir} is not a work folder of a run: it has neither {METRICS_FILE} nor about.json')
    try:
        config = (work_dir / 'config.py').read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError):
        config = ''
    trained = {line['step']: line for line in metrics if 'loss' in line}
    validated = {line['step']: line for line in metrics if 'val_loss' in line}
    return RecordedRun(
        name=work_dir.resolve().name,
        about=about,
        metrics=[trained[step] for step in sorted(trained)],
        validation=[validated[step] for step in sorted(validated)],
        samples=samples,
        config=config,
        num_torn=torn_metrics + torn_samples,
    )


def run_state(run: RecordedRun) -> tuple[str, str]:
    """How the run ended: 'finished', 'stopped' or 'failed', and a description."""
    sessions = run.about.get('sessions') or [{}]
    end = str(sessions[-1].get('end', ''))
    step = run.metrics[-1]['step'] if run.metrics else 0
    if end == 'finished':
        return 'finished', 'finished'
    if end.startswith('failed'):
        return 'failed', f'failed at step {step:,}'
    return 'stopped', f'{"interrupted" if end.startswith("interrupted") else "not finished"} at step {step:,}'


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the records of a JSON lines file that have a step, and the number of other lines."""
    if not path.exists():
        return [], 0
    check_regular(path, CheckpointError)
    raw = path.read_bytes()
    records = [record for record in objects(raw) if isinstance(record.get('step'), int)]
    return records, len(raw.splitlines()) - len(records)


def _series(lines: Sequence[dict[str, Any]], key: str) -> Series:
    series = Series()
    for line in lines:
        value = line.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            series.steps.append(line['step'])
            series.values.append(float(value))
        elif key in line:
            series.broken.append(line['step'])
    return series
