"""What the engine's loop and hooks cost over a bare PyTorch loop: same model, same batches, in one run.

    python benchmarks/loop_overhead.py [--steps 40] [--rounds 5]

Both do the same mathematics: forward, sum of losses over the step's targets, backward, clipping, AdamW. The rounds
alternate, and the medians of the step times are compared, so that a noisy machine harms both alike.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.config.schema import ScheduleConfig
from xtuner.dataset.packing.collate import collate
from xtuner.dataset.packing.sampler import EpochSampler
from xtuner.engine.distributed import Single
from xtuner.engine.hooks import CheckpointHook, LogHook
from xtuner.engine.runner import Runner
from xtuner.engine.schedule import StepSampler, TrainingSchedule
from xtuner.objectives.sft import SupervisedFinetune


def make_model() -> SupervisedFinetune:
    torch.manual_seed(0)
    return SupervisedFinetune(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
            )
        )
    )


def make_items(count: int, length: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    ids = random.integers(0, 2000, (count, length))
    labels = ids.copy()
    labels[:, 0] = -100
    return [{'input_ids': i, 'labels': j, 'position_ids': np.arange(length)} for i, j in zip(ids, labels, strict=True)]


def loader_of(items: list[dict[str, np.ndarray]], plan: TrainingSchedule) -> DataLoader:
    sampler = StepSampler(EpochSampler(len(items), seed=0), plan)
    return DataLoader(items, batch_sampler=sampler, collate_fn=lambda batch: collate(batch, pad_id=0))


def bare(items: list[dict[str, np.ndarray]], plan: TrainingSchedule) -> list[float]:
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches, seconds = iter(loader_of(items, plan)), []
    for _ in range(plan.num_steps):
        start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.schedule.accumulative_counts)]
        targets = sum(int((b['labels'][:, 1:] != -100).sum()) for b in micro_batches)
        for batch in micro_batches:
            (model(**batch) / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def engine(items: list[dict[str, np.ndarray]], plan: TrainingSchedule, work_dir: Path) -> list[float]:
    model = make_model()
    ends: list[float] = []
    runner = Runner(
        Single().prepare(model, lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)),
        loader_of(items, plan),
        hooks=[LogHook(), CheckpointHook(10**9, 1)],
        work_dir=work_dir,
        seed=0,
        trackers=['tensorboard'],
        launcher='none',
        write_model=lambda folder, weights: None,
    )
    runner.set_loop(plan=plan, compute_dtype=torch.float32, seed=0, max_nonfinite_steps=10)
    loop = runner.train_loop
    step = loop.run_iter

    def timed(batches: object) -> None:
        step(batches)
        ends.append(time.perf_counter())

    loop.run_iter = timed
    start = time.perf_counter()
    runner.train()
    # From one step's end to the next: everything between two steps is the engine's to answer for. The last step also
    # writes the run's only checkpoint, and the first builds caches: both stand outside the medians.
    return [b - a for a, b in zip([start, *ends], ends, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    logging.getLogger('xtuner').addHandler(logging.NullHandler())
    items = make_items(64, 256)
    plan = TrainingSchedule(len(items), ScheduleConfig(max_steps=args.steps, accumulative_counts=2))
    times: dict[str, list[float]] = {'bare': [], 'engine': []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            times['bare'].append(statistics.median(bare(items, plan)[1:-1]))
            times['engine'].append(statistics.median(engine(items, plan, Path(folder) / str(number))[1:-1]))
            print({name: f'{values[-1] * 1e3:.1f} ms' for name, values in times.items()}, flush=True)
    ratios = [e / b for e, b in zip(times['engine'], times['bare'], strict=True)]
    rounds = ', '.join(f'{ratio:.3f}' for ratio in ratios)
    print(f'RESULT engine / bare: median ratio {statistics.median(ratios):.3f} (rounds: {rounds})')
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')


if __name__ == '__main__':
    main()
