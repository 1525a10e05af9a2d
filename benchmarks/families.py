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

from tests.families.small import small_model
from tests.families.sweep import Result, examine
from xtuner.errors import one_line

ROUNDING = 1e-4  # relative, of loss and gradients in float32


def row_of(result: Result) -> tuple[str, str, str]:
    """What the table says of a model type: its loss, packs, generation."""
    if result.refused:
        why = (
            'a token depends on later ones' if 'later ones' in result.refused else 'its positions are not 0, 1, 2, ...'
        )
        why = 'it trains only on rows of one length' if 'rows of exactly' in result.refused else why
        return f'refused: {why}', '', ''
    loss = "by the model's own forward pass, which holds all logits" if result.own_logits else 'by its head'
    if result.rows > ROUNDING:
        loss = f'WRONG by {result.rows:.0e}'
    return loss, _packs(result), _generation(result)


def _packs(result: Result) -> str:
    if bool(result.unpacked) is not bool(result.pack_refused) or bool(result.unpacked) is not (result.pack > ROUNDING):
        return f'WRONG by {result.pack:.0e}'
    if 'attention_chunk_size' in result.unpacked:
        return 'equal up to `attention_chunk_size` tokens, beyond that switched off'
    return 'switched off: samples would see each other' if result.unpacked else 'equal'


def _generation(result: Result) -> str:
    if result.no_generation:
        return 'refused: not in transformers'
    if not result.generates:
        return 'WRONG'
    return 'equal' if result.generates_as_trained else "equal; beyond its window unlike training's forward pass"


def try_one(kind: str) -> tuple[str, str, str]:
    """A type's row; one that transformers cannot build small has the exception in it."""
    try:
        llm = small_model(kind)
    except Exception as error:  # transformers' code, whatever it raises
        return f'not tried: {one_line(error)[:80]} ...', '', ''
    return row_of(examine(kind, llm))


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
