"""Merging InternLM-7B's width: time against a plain copy of the same bytes, peak memory, and what verification says.

    python benchmarks/merge.py --work-dir DIR --tokenizer tokenizer.model [--layers 2] [--device cpu]
        [--base original dequantized] [--repeat 5] [--memory-limit 2GB] [--kills 20]

It writes the base (full vocabulary, random weights) and an adapter of rank 64 on every linear layer, copies the base's
files as the measure right before each merge, and merges in processes of their own, whose peak is the largest resident
set, mapped pages of files included. `--memory-limit` puts each merge into a control group of that size, its page cache
included, and takes the base's files out of the cache before. With `--kills`, a merge that has begun to write is killed
at random moments so many times, and runs that go on to the end are compared with one that was not killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from internlm_7b import SHAPE, shapes, write_checkpoint
from main_job import host_gib
from memory_limit import MemoryLimit, Usage, forget_pages
from merge_kills import digest, kill_often
from safetensors.torch import save_file

from xtuner.adapters.attach import Provenance
from xtuner.cli.convert.merge import size
from xtuner.model.weights.reader import fingerprint, open_weights

RANK = 64
COMMAND = [sys.executable, '-m', 'xtuner.cli.main', 'convert', 'merge']


def write_adapter(folder: Path, base: Path, layers: int) -> None:
    """A trained adapter's numbers: lora_A as peft begins it, lora_B of the size that training reaches."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes(SHAPE | {'num_hidden_layers': layers}):
        if name.endswith('_proj.weight'):
            key = f'base_model.model.{name.removesuffix(".weight")}'
            bound = shape[1] ** -0.5
            tensors[f'{key}.lora_A.weight'] = torch.empty(RANK, shape[1]).uniform_(-bound, bound, generator=generator)
            tensors[f'{key}.lora_B.weight'] = torch.empty(shape[0], RANK).normal_(0, 0.01, generator=generator)
    save_file(tensors, folder / 'adapter_model.safetensors')
    config = {'peft_type': 'LORA', 'r': RANK, 'lora_alpha': 16, 'target_modules': 'all-linear'}
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    settings = {'bits': 4, 'quant_type': 'nf4', 'double_quant': True}
    Provenance('benchmark', fingerprint(open_weights(base)), 'internlm_chat', 'bf16', settings).write(folder)


def copy_seconds(base: Path, target: Path) -> float:
    """Seconds that the disk takes to copy the base's weights, flushed."""
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(base.glob('*.bin')):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open('rb') as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


@dataclass
class Run:
    """One merge.

    Attributes:
        copy: Seconds of the copy beside it.
        began: Seconds from the start until it began to write.
        written: Until the weights were on disk.
        seconds: Until all was done.
        peak: Largest resident set, GiB.
        verified: What verification said.
        usage: Of memory, under a limit.
    """

    copy: float
    began: float
    written: float
    seconds: float
    peak: float
    verified: str
    usage: Usage | None


def merge(words: list[str], copy: float = 0.0, limit: int | None = None) -> Run:
    log: list[tuple[float, str]] = []
    with MemoryLimit(limit) if limit else nullcontext() as group:
        begun = time.perf_counter()
        command = [*COMMAND, *words]
        process = subprocess.Popen(
            group.command(command) if group else command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

        def read() -> None:
            assert process.stderr is not None
            log.extend((time.perf_counter() - begun, line.strip()) for line in process.stderr)

        reader = threading.Thread(target=read)
        reader.start()
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, host_gib(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        reader.join()
        usage = group.usage() if group else None
    if process.returncode:
        raise SystemExit('\n'.join([*(line for _, line in log), f'exit status {process.returncode}, {usage}']))
    began = next(seconds for seconds, line in log if ' merging ' in line)
    written = next(seconds for seconds, line in log if line.endswith(' changed'))
    verified = [line for _, line in log if 'verified' in line]
    return Run(copy, began, written, seconds, peak, ''.join(verified[-1:]), usage)


def report(name: str, runs: list[Run], num_bytes: int) -> None:
    """Prints the medians, and each run."""

    def middle(seconds: Callable[[Run], float]) -> float:
        return statistics.median(map(seconds, runs))

    copy, written, whole = middle(lambda r: r.copy), middle(lambda r: r.written), middle(lambda r: r.seconds)
    print(f'RESULT {name}: copy {copy:.2f} s, {num_bytes / copy / 1e6:.0f} MB/s; '
          f'{written:.2f} s from start to the last byte, {num_bytes / written / 1e6:.0f} MB/s, '
          f'{middle(lambda r: r.copy / r.written):.0%} of the copy; '
          f'{whole:.2f} s in all, {middle(lambda r: r.copy / r.seconds):.0%}; '
          f'began to write after {middle(lambda r: r.began):.2f} s; '
          f'peak {max(r.peak for r in runs):.2f} GiB; {runs[-1].verified}', flush=True)  # fmt: skip
    for run in runs:
        usage = f', {run.usage}' if run.usage else ''
        print(f'  copy {run.copy:.2f} began {run.began:.2f} written {run.written:.2f} all {run.seconds:.2f} s, '
              f'peak {run.peak:.2f} GiB{usage}', flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--tokenizer', type=Path, required=True, help="InternLM's tokenizer.model")
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--device', nargs='+', default=['cpu'])
    parser.add_argument('--base', nargs='+', default=['original', 'dequantized'])
    parser.add_argument('--verify', type=int, default=4)
    parser.add_argument('--repeat', type=int, default=1)
    parser.add_argument('--memory-limit', type=size, help='of each merge, such as 2GB; needs root')
    parser.add_argument('--kills', type=int, default=0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base, adapter, out = (args.work_dir / name for name in ('base', 'adapter', 'merged'))
    if not adapter.exists():
        write_checkpoint(base, args.tokenizer, num_hidden_layers=args.layers)
        write_adapter(adapter, base, args.layers)
    num_bytes = sum(file.stat().st_size for file in base.glob('*.bin'))
    for device in args.device:
        for kind in args.base:
            words = [str(base), str(adapter), '--base', kind, '--device', device, '--dtype', 'fp16']
            runs = []
            for _ in range(args.repeat):
                copying = copy_seconds(base, args.work_dir / 'copy')
                if args.memory_limit:
                    forget_pages(base)
                runs.append(merge([*words, str(out), '--verify', str(args.verify)], copying, args.memory_limit))
                shutil.rmtree(out)
            report(f'{kind}, {device}, {num_bytes / 1e9:.2f} GB', runs, num_bytes)
            if args.kills:
                words = [*words, str(out), '--verify', '0', '--max-shard-size', '200MB']
                run = merge(words)
                whole = digest(out)
                shutil.rmtree(out)
                kill_often([*COMMAND, *words], out, args.kills, run.written - run.began, whole)


if __name__ == '__main__':
    main()
