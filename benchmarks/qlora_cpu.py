"""Times a 4-bit training step on a CPU, with the model's own forward pass and the fused path, at three sizes of model.

    python benchmarks/qlora_cpu.py [--models demo,tiny,slice] [--tokens 16,128,512] [--dtype fp32] [--processor-time]

A step is forward, backward and an update of adapters on all seven projections by PyTorch's fused AdamW (transformers'
default), NF4 weights, every position a target. Steps of both paths take turns on the same batches; figures are medians
of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qlora_model import add_adapter, build_base
from xtuner.fused.enable import enable_fused_training, fused_linear_cross_entropy
from xtuner.model.precision import compute_dtype


@dataclass(frozen=True)
class Case:
    """A model's shape and its adapters."""

    title: str
    rank: int
    dropout: float = 0.0
    shape: dict[str, int] = field(default_factory=dict)


MODELS = {
    'demo': Case("the demo's model", 64, 0.05, {
        'vocab_size': 2000, 'hidden_size': 256, 'intermediate_size': 688, 'num_hidden_layers': 4,
        'num_attention_heads': 4}),
    'tiny': Case('4 layers of 256', 8, 0.0, {
        'vocab_size': 2048, 'hidden_size': 256, 'intermediate_size': 704, 'num_hidden_layers': 4,
        'num_attention_heads': 8}),
    'slice': Case('one layer of the 7B, 8,192 words', 64, 0.0, {'vocab_size': 8192, 'num_hidden_layers': 1}),
    'words': Case('one layer of the 7B, 103,168 words', 64, 0.0, {'num_hidden_layers': 1}),
}  # fmt: skip


class Way:
    """One path's steps on one model."""

    def __init__(self, case: Case, dtype: torch.dtype, *, fast: bool) -> None:
        self.fast = fast
        torch.manual_seed(0)
        self.model = add_adapter(build_base('cpu', dtype=dtype, **case.shape), rank=case.rank, dropout=case.dropout)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.path = enable_fused_training(self.model, enabled=fast)
        self.dtype = dtype
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One step; returns the loss per position."""
        with torch.autocast('cpu', self.dtype, enabled=self.dtype != torch.float32):
            base = self.model.get_base_model()
            hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            if self.fast:
                loss = fused_linear_cross_entropy(hidden, base.lm_head.weight, None, targets)
            else:
                loss = functional.cross_entropy(base.lm_head(hidden).float(), targets, reduction='sum')
        (loss / ids.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() / ids.numel()


def seconds(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    start = clock()
    result = call()
    return clock() - start, result


def compare(case: Case, ways: list[Way], tokens: int, rounds: int, clock: Callable[[], float]) -> None:
    """Prints a row: medians of both, their ratio, the loss after the same steps."""
    ids = torch.randint(
        3, case.shape.get('vocab_size', 103168), (1, tokens), generator=torch.Generator().manual_seed(0)
    )
    targets = functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    for way in ways:
        way.step(ids, targets)
    times: list[list[float]] = [[], []]
    losses = [0.0, 0.0]
    for _ in range(rounds):
        for number, way in enumerate(ways):
            spent, losses[number] = seconds(lambda way=way: way.step(ids, targets), clock)
            times[number].append(spent)
    stock, fast = (statistics.median(t) for t in times)
    each = sorted(a / b for a, b in zip(*times, strict=True))
    middle = f'{each[len(each) // 4]:.2f} to {each[-1 - len(each) // 4]:.2f}'
    cells = (
        case.title, tokens, f'{stock * 1e3:.1f}', f'{fast * 1e3:.1f}', f'{tokens / stock:,.0f}',
        f'{tokens / fast:,.0f}', f'{stock / fast:.2f} ({middle})', f'{losses[0]:.5f}, {losses[1]:.5f}',
    )  # fmt: skip
    print('|', ' | '.join(map(str, cells)), '|', flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', default='demo,tiny,slice', help='of ' + ', '.join(MODELS))
    p.add_argument('--tokens', default='16,128,512', help='tokens a step, comma-separated')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--dtype', default='fp32', choices=('fp32', 'bf16'))
    p.add_argument('--processor-time', action='store_true', help='in place of wall time, on a machine in use')
    args = p.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}')
    print('| model | tokens | stock, ms | ours, ms | stock, tokens/s | ours, tokens/s | ratio (middle half) | losses |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- |')
    dtype = compute_dtype(args.dtype, torch.device('cpu'))
    for name in args.models.split(','):
        case = MODELS[name]
        ways = [Way(case, dtype, fast=False), Way(case, dtype, fast=True)]
        for tokens in map(int, args.tokens.split(',')):
            compare(case, ways, tokens, args.rounds if name != 'words' else min(args.rounds, 3), clock)


if __name__ == '__main__':
    main()
