"""Peak memory of a training step of InternLM-7B's shape, predicted against measured, over a dozen configurations.

    python benchmarks/estimate.py [--out FOLDER] [--layers 32] [--rows NAME,NAME] [--seconds 90]

Random weights straight onto the GPU, random tokens of which four in five are trained, the training loss as the engine
computes it. Compared is `torch.cuda.max_memory_allocated`. `reserved` is the most that torch took of the card, which
grows with what is free where layers' inputs go to the host; beside it the prediction with graphs and fragments. A row
is batch x length / checkpointing, and what differs from NF4, rank 64, no dropout, paged AdamW, the fused path.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qlora_model import SHAPE, add_adapter, build_base, set_dropout
from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.fused.enable import enable_fused_training, sync_once_per_step
from xtuner.memory.dims import model_dims
from xtuner.memory.predict import Setup, predict_memory
from xtuner.objectives.sft import SupervisedFinetune

GIB = 2**30
TARGET_SHARE = 0.8


@dataclass(frozen=True)
class Row:
    """One configuration."""

    batch: int
    length: int
    checkpointing: bool
    dropout: float = 0.0
    rank: int = 64
    bits: int | None = 4
    fast: bool = True
    paged: bool = True
    accumulated: int = 2

    @property
    def name(self) -> str:
        """Its name in the table."""
        parts = [f'{self.batch}x{self.length}', 'on' if self.checkpointing else 'off']
        parts += [f'dropout {self.dropout}'] if self.dropout else []
        parts += [f'rank {self.rank}'] if self.rank != 64 else []
        parts += ['bf16 base'] if self.bits is None else []
        parts += [] if self.fast else ['own forward pass']
        parts += [] if self.paged else ['torch AdamW']
        parts += ['one micro-batch'] if self.accumulated == 1 else []
        return ' / '.join(parts)


ROWS = [
    Row(1, 2048, True, dropout=0.1),
    Row(1, 2048, True, accumulated=1),
    Row(1, 2048, False),
    Row(1, 4096, False, dropout=0.1),
    Row(2, 4096, True),
    Row(4, 2048, True, dropout=0.1),
    Row(4, 2048, False),
    Row(8, 2048, True),
    Row(1, 8192, True),
    Row(4, 2048, True, paged=False),
    Row(1, 2048, True, fast=False),
    Row(1, 2048, False, fast=False),
    Row(1, 2048, False, dropout=0.1, fast=False),
    Row(4, 2048, True, dropout=0.1, fast=False),
    Row(4, 2048, True, rank=16),
    Row(3, 1024, False, rank=16),
    Row(4, 2048, True, bits=None),
    Row(1, 2048, False, bits=None),
]


def form(row: Row) -> tuple[Any, ...]:
    """Rows that share a form share a model."""
    return row.bits, row.rank, row.fast


def build(row: Row, layers: int) -> Any:
    return add_adapter(build_base('cuda', quantise=row.bits == 4, num_hidden_layers=layers), dropout=0.5, rank=row.rank)


def prepare(model: Any, row: Row) -> None:
    base = model.get_base_model()
    if row.checkpointing:
        base.gradient_checkpointing_enable({'use_reentrant': False})
    else:
        base.gradient_checkpointing_disable()
    set_dropout(model, row.dropout)
    model.train()
    print(enable_fused_training(model, enabled=row.fast), flush=True)


def measure(model: Any, row: Row) -> dict[str, float]:
    """GiB: the most that torch counted and held, what the driver has given out, and what there was before the step."""
    import bitsandbytes as bnb

    loss_of = SupervisedFinetune(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = (bnb.optim.PagedAdamW32bit if row.paged else torch.optim.AdamW)(trained, lr=1e-4)
    sync_once_per_step(optimizer)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the rows before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = torch.cuda.memory_allocated()
    for _ in range(3 if row.batch * row.length <= MAX_GRAPH_TOKENS else 2):  # graphs are recorded at the fourth batch
        for _ in range(row.accumulated):
            ids = torch.randint(3, 100_000, (row.batch, row.length), device='cuda')
            labels = torch.where(torch.rand(ids.shape, device='cuda') < TARGET_SHARE, ids, -100)
            positions = torch.arange(row.length, device='cuda').expand_as(ids)
            with torch.autocast('cuda', torch.bfloat16):
                loss = loss_of(ids, labels, positions)
            (loss / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del loss, ids, labels, positions
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        'allocated': torch.cuda.max_memory_allocated() / GIB,
        'reserved': torch.cuda.max_memory_reserved() / GIB,
        'driver': (total - free) / GIB,
        'paged': sum(p.numel() for p in trained) * 8 * row.paged / GIB,
        'begin': begin / GIB,
    }


def predict(row: Row, layers: int) -> Any:
    from transformers import LlamaConfig

    section = {'type': 'peft:LoraConfig', 'r': row.rank, 'lora_dropout': row.dropout, 'target_modules': 'all-linear',
               'task_type': 'CAUSAL_LM'}  # fmt: skip
    shape = model_dims(LlamaConfig(**{**SHAPE, 'num_hidden_layers': layers}), section)
    return predict_memory(Setup(
        shape, row.batch * row.length, row.length, bits=row.bits, checkpointing=row.checkpointing, fast=row.fast,
        accumulated=row.accumulated > 1, paged=row.paged, optimizer_spare=0 if row.paged else 4,
        target_share=TARGET_SHARE,
    ))  # fmt: skip


def reserved(expected: Any) -> int:
    beside = expected.untracked
    return expected.allocated + beside.get('recorded graphs', 0) + beside['fragments']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='folder for estimate.jsonl and estimate.md')
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--seconds', type=float, default=float('inf'), help='begin no row after so long')
    parser.add_argument('--rows', help='names of rows, separated by commas')
    args = parser.parse_args()
    started = time.perf_counter()
    wanted = args.rows.split(',') if args.rows else [row.name for row in ROWS]
    lines, records, built, model = [], [], None, None
    torch.zeros(1, device='cuda')
    free, total = torch.cuda.mem_get_info()
    bare = f'a bare context takes {(total - free) / GIB:.2f} GiB'
    lines.append(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; {bare}\n')
    lines.append('| configuration | predicted, GiB | measured | off by | reserved, predicted | reserved | highest at |')
    lines.append('| --- | ---: | ---: | ---: | ---: | ---: | --- |')
    print('\n'.join(lines), flush=True)
    for row in (r for r in ROWS if r.name in wanted):
        if time.perf_counter() - started > args.seconds:
            print(f'{row.name}: no time left', flush=True)
            continue
        if form(row) != built:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            model, built = build(row, args.layers), form(row)
        prepare(model, row)
        found, expected = measure(model, row), predict(row, args.layers)
        off = expected.allocated / GIB / found['allocated'] - 1
        lines.append(f'| {row.name} | {expected.allocated / GIB:.2f} | {found["allocated"]:.2f} | {off:+.1%} '
                     f'| {reserved(expected) / GIB:.2f} | {found["reserved"]:.2f} | {expected.phase} |')  # fmt: skip
        terms = {k: round(v / GIB, 3) for k, v in {**expected.terms, **expected.untracked}.items()}
        records.append({'row': row.name, 'measured': found, 'predicted': expected.allocated / GIB, 'terms': terms})
        print(lines[-1], json.dumps(records[-1]), flush=True)
        if args.out:  # after each row: whoever runs out of time keeps what there is
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / 'estimate.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
            (args.out / 'estimate.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')


if __name__ == '__main__':
    main()
