"""Times a QLoRA training step of an InternLM-7B-sized model: ours and the installed peers, in one go on one GPU.

    python benchmarks/qlora_step.py                        all rows, all that is installed, the table with ratios
    python benchmarks/qlora_step.py --impl ours --rows 4x2048/off,1x2048/on --profile OUT.txt
    python benchmarks/qlora_step.py --table LOG...         only the table, from the RESULT lines of earlier runs

A row is batch x length / checkpointing (off, on, auto) [/ dropout] [/ packed] [/ fp8]; the last two, and auto, are ours
alone. A step is forward, backward, clipping and a PagedAdamW32bit update of rank-64 adapters on all seven projections,
over NF4 weights with quantised scales; random weights, random tokens.
Every implementation runs in a process of its own. `limit` is the arithmetic of the frozen products, the adapters, the
head and causal attention over the 788 TFLOP/s that an 8192-cubed bf16 product reaches on an H200.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('UNSLOTH_DISABLE_STATISTICS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROWS = '1x2048/off,4x2048/off,1x2048/on,4x2048/on,8x2048/on,1x8192/on,4x2048/on/0.1'
LIMITS = {('off', 2048): 25_800, ('on', 2048): 17_500, ('on', 8192): 15_000}
IMPLS = ('ours', 'unsloth', 'liger', 'stock')


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--impl', default='all', help='all, or some of ours,unsloth,liger,stock')
    p.add_argument('--rows', default=ROWS)
    p.add_argument('--steps', type=int, default=9, help='steps a row, the last four of which count')
    p.add_argument('--layers', type=int, default=32)
    p.add_argument('--family', default='internlm', choices=('internlm', 'internlm2'), help='of the 7B model')
    p.add_argument('--log', type=Path, help='write every result there as it comes')
    p.add_argument('--profile', type=Path, help='write where the time of one step of the first row goes')
    p.add_argument('--model', type=Path, default=Path('/tmp/internlm-7b-random'), help='checkpoint for unsloth')
    p.add_argument('--tokenizer', type=Path, help='folder with a tokenizer.json, which unsloth insists on')
    p.add_argument('--no-graphs', action='store_true', help='ours without CUDA graphs')
    p.add_argument('--table', nargs='+', type=Path, help='logs to make the table of')
    return p.parse_args()


@dataclass(frozen=True)
class Row:
    """What one row of the table measures."""

    batch: int
    length: int
    checkpointing: str
    dropout: float
    packed: bool
    fp8: bool

    @classmethod
    def of(cls, text: str) -> Row:
        """Reads `1x2048/on/0.1/packed`."""
        shape, checkpointing, *rest = text.split('/')
        batch, length = map(int, shape.split('x'))
        dropout = [float(r) for r in rest if r not in ('packed', 'fp8')]
        return cls(batch, length, checkpointing, sum(dropout), 'packed' in rest, 'fp8' in rest)


def positions_of(row: Row, ids: Any) -> Any:
    """Each row a sample; in a packed row eight, whose lengths change from step to step."""
    import torch

    count = torch.arange(ids.shape[1], device=ids.device)
    if not row.packed:
        return count.expand_as(ids)
    cuts = torch.randperm(ids.shape[1] - 2, device=ids.device)[:7].sort().values + 1
    begins = torch.zeros_like(count)
    begins[cuts] = cuts
    return (count - begins.cummax(0).values).expand_as(ids)


def load(impl: str, args: argparse.Namespace, row: Row) -> Any:
    import torch

    from benchmarks.qlora_model import TARGETS, add_adapter, build_base

    if impl == 'unsloth':
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(args.model), max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        return FastLanguageModel.get_peft_model(
            model, r=64, lora_alpha=16, lora_dropout=row.dropout, target_modules=TARGETS,
            use_gradient_checkpointing='unsloth' if row.checkpointing == 'on' else False,
        )  # fmt: skip
    model = build_base('cuda', family=args.family, num_hidden_layers=args.layers)
    if impl == 'liger':
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    if impl == 'stock':
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = add_adapter(model, dropout=0.5)
    if impl == 'liger':
        adapted = adapted.to(torch.bfloat16)
    return adapted


def set_up(impl: str, model: Any, args: argparse.Namespace, row: Row) -> None:
    """Puts a model into a row's setting; unsloth fixes its own when it loads."""
    from benchmarks.qlora_model import set_checkpointing, set_dropout

    if impl == 'unsloth':
        return
    set_checkpointing(model, row.checkpointing == 'on')
    set_dropout(model, row.dropout)
    if impl == 'ours':
        from xtuner.fused.enable import enable_fused_training

        print(enable_fused_training(model, recompute_by_memory=row.checkpointing == 'auto', fp8=row.fp8), flush=True)
        model.get_base_model().get_decoder().forward.fused.graphs.enabled = not args.no_graphs


def loss_of(impl: str, model: Any, ids: Any, positions: Any) -> Any:
    import torch

    if impl != 'ours':
        with torch.autocast('cuda', dtype=torch.bfloat16, enabled=impl != 'liger'):
            extra = {} if impl == 'unsloth' else {'position_ids': positions}
            return model(input_ids=ids, labels=ids, **extra).loss
    from xtuner.fused.enable import fused_linear_cross_entropy, target_rows

    base = model.get_base_model()
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    rows = target_rows(labels)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        hidden = base.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        total = fused_linear_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, labels, rows=rows)
    return total / len(rows)


def run(impl: str, args: argparse.Namespace) -> None:
    if impl == 'unsloth':
        import unsloth  # noqa: F401  (it must be imported before transformers)
    import bitsandbytes as bnb
    import torch

    rows = args.rows.split(',')
    model = load(impl, args, Row.of(rows[0]))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trainable, lr=2e-4)
    if impl == 'ours':
        from xtuner.fused.enable import sync_once_per_step

        sync_once_per_step(optimizer)

    issue = [0.0]

    def step(ids: Any, positions: Any) -> Any:
        start = time.perf_counter()
        loss = loss_of(impl, model, ids, positions)
        loss.backward()
        issue[0] = time.perf_counter() - start
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for number, name in enumerate(rows):
        row = Row.of(name)
        set_up(impl, model, args, row)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, issued = [], []
        try:
            for _ in range(args.steps):
                ids = torch.randint(3, 90_000, (row.batch, row.length), device='cuda')
                positions = positions_of(row, ids)
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss = step(ids, positions)
                issued.append(issue[0])
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            print(f'{impl} {name}: out of memory', flush=True)
            optimizer.zero_grad()
            continue
        median = statistics.median(seconds[-4:])
        result = {
            'impl': impl,
            'row': name,
            'tokens_per_s': round(row.batch * row.length / median),
            'step_ms': round(median * 1e3, 1),
            'issue_ms': round(min(issued[-4:]) * 1e3, 1),
            'spread_ms': [round(s * 1e3, 1) for s in seconds[-4:]],
            'peak_gib': round(torch.cuda.max_memory_allocated() / 2**30, 2),
            'reserved_gib': round(torch.cuda.max_memory_reserved() / 2**30, 2),
            'loss': round(loss.item(), 4),
        }
        print('RESULT ' + json.dumps(result), flush=True)
        if args.profile and number == 0:
            profile(partial(step, ids, positions), args.profile)


def profile(step: Any, path: Path) -> None:
    """One step's kernels by time, and their sum by kind."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    kinds = {
        'attention': 'fmha|flash|cudnn|sdpa',
        'products': 'gemm|nvjet|cutlass|splitK|matmul',
        'optimizer': 'Optimizer|multi_tensor',
        'dequantise': 'equantize',
        'norm': 'rms_norm',
        'rotary': '_rotate',
        'swiglu': 'swiglu',
        'loss': 'cross_entropy',
        'dropout products': '^_project|^_weight_grad|^_input_grad',
        'copies over the bus': 'Pinned',
        'copies': 'emcpy|copy|Memset|fill|cat|Cat',
    }
    sums: dict[str, list[float]] = {}
    marks = r'^(autograd::|aten::|bitsandbytes::|Optimizer|\w*Function|_LinearCross)'  # spans, not kernels
    events = [e for e in trace.key_averages() if e.self_device_time_total > 0 and not re.match(marks, e.key)]
    for e in events:
        kind = next((k for k, p in kinds.items() if re.search(p, e.key)), 'other elementwise')
        entry = sums.setdefault(kind, [0.0, 0])
        entry[0] += e.self_device_time_total / 1e3
        entry[1] += e.count
    lines = [
        f'{ms:9.2f} ms {count:6.0f} launches  {k}' for k, (ms, count) in sorted(sums.items(), key=lambda i: -i[1][0])
    ]
    lines += ['']
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:60]:
        lines.append(f'{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d}  {e.key[:150]}')
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines[:14]), flush=True)


def write_checkpoint(args: argparse.Namespace) -> None:
    """unsloth only reads from disk."""
    import shutil

    if not args.model.exists():
        from benchmarks.qlora_model import build_base

        build_base('cuda', quantise=False, num_hidden_layers=args.layers).save_pretrained(
            args.model, max_shard_size='4GB'
        )
    if args.tokenizer:
        shutil.copytree(args.tokenizer, args.model, dirs_exist_ok=True)


def installed(impl: str) -> bool:
    needed = {'unsloth': 'unsloth', 'liger': 'liger_kernel'}.get(impl)
    return needed is None or importlib.util.find_spec(needed) is not None


def run_all(impls: list[str], args: argparse.Namespace) -> list[str]:
    """Every implementation in processes of its own; one for each setting where it cannot be changed later."""
    lines = []
    for impl in impls:
        rows = args.rows.split(',')
        if impl != 'ours':
            rows = [r for r in rows if not Row.of(r).fp8 and Row.of(r).checkpointing != 'auto']
        if impl == 'unsloth':  # with dropout or packs it does not take its own path
            rows = [r for r in rows if not Row.of(r).dropout and not Row.of(r).packed]
            subprocess.run([sys.executable, __file__, '--impl', 'checkpoint', *_passed(args, rows)], check=False)
        # unsloth fixes its setting when it loads; our recorded graphs of one row would count in the next one's peak
        key = {'unsloth': lambda r: r.split('/', 1)[1], 'ours': lambda r: r.startswith('1x2048/on')}.get(
            impl, lambda r: 0
        )
        for setting in sorted({key(r) for r in rows}):
            chosen = [r for r in rows if key(r) == setting]
            command = [sys.executable, __file__, '--impl', impl, *_passed(args, chosen)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            print(done.stdout, flush=True)
            lines += done.stdout.splitlines()
            if args.log:
                args.log.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return lines


def _passed(args: argparse.Namespace, rows: list[str]) -> list[str]:
    given = [
        '--rows',
        ','.join(rows),
        '--steps',
        str(args.steps),
        '--layers',
        str(args.layers),
        '--family',
        args.family,
        '--model',
        str(args.model),
    ]
    return given + (['--tokenizer', str(args.tokenizer)] if args.tokenizer else [])


def print_table(lines: list[str]) -> None:
    """Tokens/s and GiB of each implementation, and ours over each peer's."""
    found: dict[tuple[str, str], dict] = {}
    for line in lines:
        if line.startswith('RESULT '):
            result = json.loads(line[7:])
            found[result['row'], result['impl']] = result
    print(
        '| row | ' + ' | '.join(f'{i}, tok/s · GiB' for i in IMPLS) + ' | ours/unsloth | /liger | /stock | of limit |'
    )
    print('| --- |' + ' --- |' * 8)
    for row in dict.fromkeys(r for r, _ in found):
        wanted = Row.of(row)
        ours = found.get((row, 'ours'))
        cells = [found.get((row, i)) for i in IMPLS]
        texts = [f'{c["tokens_per_s"]:,} · {c["peak_gib"]:.1f}' if c else '-' for c in cells]
        ratios = [f'{ours["tokens_per_s"] / c["tokens_per_s"]:.2f}' if ours and c else '-' for c in cells[1:]]
        limit = None if wanted.fp8 else LIMITS.get((wanted.checkpointing, wanted.length))
        share = f'{ours["tokens_per_s"] / limit:.0%}' if ours and limit else '-'
        print(f'| {row} | ' + ' | '.join(texts + ratios) + f' | {share} |')


def main() -> None:
    args = parse_args()
    if args.table:
        print_table([line for path in args.table for line in path.read_text(encoding='utf-8').splitlines()])
    elif args.impl == 'checkpoint':
        write_checkpoint(args)
    elif args.impl in IMPLS:
        run(args.impl, args)
    else:
        chosen = list(IMPLS) if args.impl == 'all' else args.impl.split(',')
        known = IMPLS if args.family == 'internlm' else ('ours', 'stock')  # the peers know Llama's classes
        print_table(run_all([i for i in chosen if installed(i) and i in known], args))


if __name__ == '__main__':
    main()
