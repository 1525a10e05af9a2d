"""Merging InternLM-7B's width: time against a plain copy of the same bytes, peak memory, and what verification says.

    python benchmarks/merge.py --work-dir DIR [--layers 2] [--device cpu] [--base original dequantized] [--kills 20]

It writes the base (full vocabulary, random weights) and an adapter of rank 64 on every linear layer, copies the base's
files as the measure, and merges in processes of their own, whose peak is the largest resident set, mapped pages of
files included. With `--kills`, a merge is killed at random moments so many times, run to its end, and compared with one
that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from internlm_7b import SHAPE, shapes, write_checkpoint
from main_job import host_gib
from safetensors.torch import save_file

from xtuner.model.adapter import Provenance
from xtuner.model.weights import fingerprint, open_weights

RANK = 64


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


def copy_seconds(base: Path, target: Path) -> tuple[float, int]:
    """Seconds that the disk takes to copy the base's weights, flushed; and their bytes."""
    target.mkdir()
    files = sorted(base.glob('*.bin'))
    start = time.perf_counter()
    for file in files:
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open('rb') as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds, sum(file.stat().st_size for file in files)


def start(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, '-m', 'xtuner.cli.main', 'convert', 'merge', *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@dataclass
class Run:
    """One merge: seconds until the weights were on disk and until all was done, peak resident GiB, verification."""

    written: float
    seconds: float
    peak: float
    verified: str


def merge(words: list[str]) -> Run:
    begun = time.perf_counter()
    process = start(words)
    log: list[tuple[float, str]] = []

    def read() -> None:
        assert process.stderr is not None
        log.extend((time.perf_counter() - begun, line.strip()) for line in process.stderr)

    reader = threading.Thread(target=read)
    reader.start()
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, host_gib(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit('\n'.join(line for _, line in log))
    verified = [line for _, line in log if 'verified' in line]
    written = next(seconds for seconds, line in log if line.endswith(' changed'))
    return Run(written, time.perf_counter() - begun, peak, ''.join(verified[-1:]))


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def kill(words: list[str], out: Path, kills: int, seconds: float, whole: str) -> None:
    """Kills the same merge again and again; each run goes on where the last was, until one is done."""
    draw = random.Random(0)
    shards: list[int | str] = []
    while len(shards) < kills:
        process = start([*words, str(out)])
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.communicate()
        shards.append(len(list(out.with_name(f'.partial-{out.name}').glob('*.safetensors'))))
        if out.exists():  # it was done before it was killed
            shards[-1] = f'done, same bytes: {digest(out) == whole}'
            shutil.rmtree(out)
    print(f'RESULT killed {kills} times; finished shards each time: {shards}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--tokenizer', type=Path, required=True, help="InternLM's tokenizer.model")
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--device', nargs='+', default=['cpu'])
    parser.add_argument('--base', nargs='+', default=['original', 'dequantized'])
    parser.add_argument('--verify', type=int, default=4)
    parser.add_argument('--kills', type=int, default=0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base, adapter = args.work_dir / 'base', args.work_dir / 'adapter'
    if not adapter.exists():
        write_checkpoint(base, args.tokenizer, num_hidden_layers=args.layers)
        write_adapter(adapter, base, args.layers)
    copying, num_bytes = copy_seconds(base, args.work_dir / 'copy')
    print(f'RESULT copy: {num_bytes / 1e9:.2f} GB in {copying:.1f} s, {num_bytes / copying / 1e6:.0f} MB/s', flush=True)
    for device in args.device:
        for kind in args.base:
            words = [str(base), str(adapter), '--base', kind, '--device', device, '--dtype', 'fp16']
            out = args.work_dir / 'merged'
            run = merge([*words, str(out), '--verify', str(args.verify)])
            print(f'RESULT {kind}, {device}: {run.written:.1f} s from start to the last byte, '
                  f'{num_bytes / run.written / 1e6:.0f} MB/s, {copying / run.written:.0%} of the copy; '
                  f'{run.seconds:.1f} s in all; peak {run.peak:.2f} GiB; {run.verified}', flush=True)  # fmt: skip
            shutil.rmtree(out)
            if args.kills:
                words += ['--verify', '0', '--max-shard-size', '200MB']
                merge([*words, str(out)])
                whole = digest(out)
                shutil.rmtree(out)
                kill(words, out, args.kills, run.written, whole)
                merge([*words, str(out)])
                print(f'RESULT the same bytes as one that was not killed: {digest(out) == whole}', flush=True)
                shutil.rmtree(out)


if __name__ == '__main__':
    main()
