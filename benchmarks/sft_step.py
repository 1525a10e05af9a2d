"""Times a step of supervised fine-tuning through `SupervisedFinetune`: decoder, head, loss, optimizer.

    python benchmarks/sft_step.py [--rows 4x2048/off,1x2048/on] [--steps 17]

InternLM-7B's shape in NF4 under a rank-64 adapter, one target in four left out; a row is batch x length /
recomputation. Run it in the trees of two revisions in turn to compare them; it knows the names of
f519160 too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    import bitsandbytes as bnb

    from benchmarks.qlora_model import add_adapter, build_base, set_checkpointing

    try:
        from xtuner.fused.enable import enable_fused_training, sync_once_per_step
        from xtuner.objectives.sft import SupervisedFinetune
    except ImportError:
        from xtuner.model.fast import enable_fast_path as enable_fused_training
        from xtuner.model.fast import wait_once_a_step as sync_once_per_step
        from xtuner.model.sft import SupervisedFinetune

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='4x2048/off,1x2048/on')
    parser.add_argument('--steps', type=int, default=17, help='steps per row; the first five do not count')
    args = parser.parse_args()
    model = add_adapter(build_base('cuda'))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trained, lr=2e-4)
    sync_once_per_step(optimizer)
    module = SupervisedFinetune(model).train()
    for row in args.rows.split(','):
        shape, recompute = row.split('/')
        batch, length = map(int, shape.split('x'))
        set_checkpointing(model, recompute == 'on')
        enable_fused_training(model)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        generator, seconds = torch.Generator().manual_seed(0), []
        for _ in range(args.steps):
            ids = torch.randint(3, 90_000, (batch, length), generator=generator)
            labels = ids.clone()
            labels[:, ::4] = -100
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast('cuda', dtype=torch.bfloat16):
                loss = module(input_ids=ids, labels=labels, position_ids=torch.arange(length).expand_as(ids))
            (loss / int((labels[:, 1:] != -100).sum())).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[5:])
        result = {'row': row, 'tokens_per_s': round(batch * length / median), 'step_ms': round(median * 1e3, 2),
                  'peak_gib': round(torch.cuda.max_memory_allocated() / 2**30, 3)}  # fmt: skip
        print('RESULT ' + json.dumps(result), flush=True)


if __name__ == '__main__':
    main()
