"""The main job at real size, as a user types it: train, merge, chat; time and peak memory of each.

    python benchmarks/main_job.py --model FOLDER --data FILE --work-dir DIR [--steps 20]

Each step is a process of its own. Host memory is the process's largest resident set; GPU memory is what the driver
says is in use on the card, sampled five times a second, so it counts the CUDA context and the allocator's reserve too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Measured:
    """One process: its name, wall time, and peaks."""

    name: str
    seconds: float
    host_gib: float
    gpu_gib: float
    output: str


def gpu_used_gib() -> float:
    if shutil.which('nvidia-smi') is None:
        return 0.0
    query = ['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
    return max(float(line) for line in subprocess.check_output(query, text=True).split()) / 1024


def host_gib(pid: int) -> float:
    """The largest resident set so far; 0 once the process has gone."""
    try:
        lines = Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith('VmHWM')), 0.0)


def measure(name: str, words: list[str], *, text: str = '') -> Measured:
    print(f'--- {name}: xtuner {" ".join(words)}', flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, '-m', 'xtuner.cli.main', *words], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    peaks, done = [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peaks[:] = max(peaks[0], host_gib(process.pid)), max(peaks[1], gpu_used_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate(text)
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f'{name} failed with exit status {process.returncode}')
    return Measured(name, time.perf_counter() - start, *peaks, output.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True)
    parser.add_argument('--data', required=True)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--config', default='internlm_7b_qlora_oasst1')
    args = parser.parse_args()
    run, merged = args.work_dir / 'run', args.work_dir / 'merged'
    words = ['train', args.config, '--model', args.model, '--data', args.data, '--work-dir', str(run)]
    rows = [measure('train', [*words, '--max-steps', str(args.steps)])]
    adapter = rows[0].output
    rows.append(measure('merge', ['convert', 'merge', args.model, adapter, str(merged), '--dtype', 'fp16']))
    chat = ['--max-new-tokens', '20', '--temperature', '0']
    rows.append(measure('chat, merged', ['chat', str(merged), *chat], text='Hello\n'))
    rows.append(measure('chat, adapter', ['chat', args.model, '--adapter', adapter, *chat], text='Hello\n'))
    metrics = [json.loads(line) for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    steps = sorted(m['seconds'] for m in metrics if 'seconds' in m)
    speed = sorted(m['tokens_per_second'] for m in metrics if 'tokens_per_second' in m)
    for row in rows:
        print(
            f'RESULT {row.name}: {row.seconds:.1f} s, host peak {row.host_gib:.1f} GiB, GPU peak {row.gpu_gib:.1f} GiB'
        )
    print(f'RESULT step: median {steps[len(steps) // 2]:.2f} s, {speed[len(speed) // 2]:,.0f} tokens/s, '
          f'loss {metrics[0]["loss"]:.4f} to {metrics[-1]["loss"]:.4f}, allocated peak '
          f'{max(m.get("peak_memory_gib", 0) for m in metrics):.2f} GiB')  # fmt: skip


if __name__ == '__main__':
    main()
