"""Splits a model folder's weights into smaller shards."""

from __future__ import annotations

import shutil
from pathlib import Path

from xtuner import __version__
from xtuner.convert.output import atomic_folder, check_output
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.model.loading import resolve_model
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import fingerprint, open_weights

_WEIGHTS = ('.safetensors', '.bin', '.pth', '.pt', '.gguf', '.h5', '.msgpack', '.onnx')


def split(model: str, out: Path, *, max_shard_bytes: int = 1) -> Path:
    """Writes a model in .safetensors shards of limited size; by default one file per tensor.

    Args:
        model: A model's folder or hub id.
        out: A missing or empty folder. It appears only once it is complete.
        max_shard_bytes: Maximum bytes per file, unless a single tensor is larger.

    Returns:
        `out`.

    Raises:
        ModelError: The model cannot be read, or `out` is not empty or cannot be written.
    """
    check_output(out)
    folder = resolve_model(model)
    reader = open_weights(folder)
    plans = [TensorPlan(name, reader.shape(name), reader.dtype(name)) for name in reader.names()]
    job = ['split', __version__, fingerprint(reader), max_shard_bytes]
    with atomic_folder(out, job) as partial:
        write_weights(partial, plans, max_shard_bytes, lambda plan: (
            reader.rows(plan.name, start, stop) for start, stop in row_blocks(plan.shape)
        ))  # fmt: skip
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith('.index.json'):
                shutil.copyfile(path, partial / path.name)
    return out
