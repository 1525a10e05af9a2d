"""Times a 4-bit training step on a CPU, stock path and fast path: a tiny model and one layer of the 7B.

    python benchmarks/qlora_cpu.py [--tokens 256] [--steps 5]

A step is forward, backward and an AdamW update of adapters on all seven projections, float32, NF4 weights. Times are
processor time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qlora_model import add_adapter, build_base
from xtuner.model.fast import enable_fast_path, fused_linear_cross_entropy

TINY = {
    'vocab_size': 2048, 'hidden_size': 256, 'intermediate_size': 704, 'num_hidden_layers': 4, 'num_attention_heads': 8,
}  # fmt: skip
SLICE = {'vocab_size': 8192, 'num_hidden_layers': 1}


def measure(model: Any, ids: torch.Tensor, steps: int, *, fast: bool) -> tuple[float, float]:
    """Least processor seconds of a step (so that other programs' load does not count), and the last loss."""
    print(' ', enable_fast_path(model, enabled=fast))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    seconds, loss = [], torch.zeros(())
    for _ in range(steps + 1):
        start = time.process_time()
        base = model.get_base_model()
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        if fast:
            loss = fused_linear_cross_entropy(hidden, base.lm_head.weight, None, labels) / ids.numel()
        else:
            loss = torch.nn.functional.cross_entropy(base.lm_head(hidden), labels, reduction='sum') / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return min(seconds[1:]), loss.item()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tokens', default='16,64,256', help='tokens a step, comma-separated')
    p.add_argument('--steps', type=int, default=5)
    args = p.parse_args()
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    for name, shape in (('tiny', TINY), ('one layer of the 7B', SLICE)):
        base = build_base('cpu', dtype=torch.float32, **shape)
        model = add_adapter(base, rank=8 if name == 'tiny' else 64)
        for tokens in map(int, args.tokens.split(',')):
            ids = torch.randint(3, shape['vocab_size'], (1, tokens), generator=torch.Generator().manual_seed(0))
            stock, stock_loss = measure(model, ids, args.steps, fast=False)
            fast, fast_loss = measure(model, ids, args.steps, fast=True)
            ratio = f'{stock / fast:.2f}x'
            print(f'{name}, {tokens} tokens: stock {stock * 1e3:.0f} ms (loss {stock_loss:.4f}), '
                  f'fast {fast * 1e3:.0f} ms (loss {fast_loss:.4f}), {ratio}', flush=True)  # fmt: skip


if __name__ == '__main__':
    main()
