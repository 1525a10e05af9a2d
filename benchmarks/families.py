"""Prints docs/models.md's table of model families: what every causal class of transformers does here, built small.

    python benchmarks/families.py [TYPE ...]

About a minute on an idle core. Differences above `ROUNDING` that nothing refuses are printed as WRONG, and the exit
status is 1.
"""

from __future__ import annotations

import datetime
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.sweep import Result, examine
from xtuner.errors import one_line

ROUNDING = 1e-4  # relative, of loss and gradients in float32


def row_of(result: Result) -> tuple[str, str, str]:
    """What the table says of a model type: its loss, packs, generation."""
    if result.refused:
        return f'refused: {result.refused.replace(repr(result.kind), "...")}', '', ''
    loss = "the model's own forward pass, all logits at once" if result.own_logits else 'by its head'
    if result.rows > ROUNDING:
        loss = f'WRONG by {result.rows:.0e}'
    packs = 'right'
    if result.unpacked:
        mixes = 'see each other' in result.unpacked
        packs = (
            'switched off: samples would see each other' if mixes else 'right up to `attention_chunk_size`, then off'
        )
    elif result.pack_refused or result.pack > ROUNDING:
        packs = f'WRONG by {result.pack:.0e}' if not result.pack_refused else 'refused after loading'
    generation = 'equal' if result.generates else 'refused' if result.no_generation else 'WRONG'
    return loss, packs, generation


def try_one(kind: str) -> tuple[str, str, str]:
    """A type's row; one that transformers cannot build small has the exception in it."""
    try:
        return row_of(examine(kind))
    except Exception as error:  # transformers' code, whatever it raises
        return f'not tried, cannot be built small: {one_line(error)[:90]}', '', ''


def main() -> int:
    """Prints the table and returns the exit status."""
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    kinds = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for kind in kinds:
        rows[try_one(kind)].append(kind)
    print(f'{len(kinds)} model types, {datetime.date.today()}, transformers {transformers.__version__}, '
          f'torch {torch.__version__}, float32 on a CPU (`python benchmarks/families.py`):\n')  # fmt: skip
    print('| loss | packs | greedy ids | model types |\n| --- | --- | --- | --- |')
    for row, names in sorted(rows.items(), key=lambda item: -len(item[1])):
        print(f'| {" | ".join(row)} | {len(names)}: {", ".join(names)} |')
    print(f'{time.perf_counter() - started:.0f} s', file=sys.stderr)
    return int(any('WRONG' in text for row in rows for text in row))


if __name__ == '__main__':
    sys.exit(main())
