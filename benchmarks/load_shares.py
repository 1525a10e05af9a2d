"""Host memory of a rank that loads a model for `fsdp`: cut while it is loaded, against loaded whole and cut later.

    python benchmarks/load_shares.py [--layers 4] [--ranks 2,4] [--bits 4,16] [--device cpu]

A checkpoint of a few layers of InternLM-7B's width is written in the published format; then each rank loads it, in 4
bit or in bf16, puts a LoRA adapter on it and shards it. On a CPU the model itself is in host memory; the peak is the
largest `RssAnon` of a rank, sampled each 10 ms, less what the process had before. Files that are mapped are not
counted: those pages are shared by all ranks of a machine. `--device cuda` adds the peak on the card.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def anonymous_bytes() -> int:
    lines = Path('/proc/self/status').read_text(encoding='ascii').splitlines()
    return 1024 * int(next(line for line in lines if line.startswith('RssAnon')).split()[1])


class Peak:
    """The largest `RssAnon` in a block, beyond what there was at its beginning."""

    def __enter__(self) -> Peak:
        self.before = self.largest = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.largest = max(self.largest, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = anonymous_bytes()


def load(folder: Path, bits: int, cut: bool, device: str, rank: int, world_size: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from torch.distributed.tensor import DTensor

    from xtuner.adapters.attach import attach_adapter
    from xtuner.config.schema import QuantizationConfig
    from xtuner.engine.distributed.fsdp import FullyShard
    from xtuner.model.loading import load_model
    from xtuner.model.sharded_loading import ShardSpec
    from xtuner.objectives.sft import SupervisedFinetune

    started = time.perf_counter()
    with Peak() as peak:
        llm: Any = load_model(
            folder, dtype=torch.bfloat16, quantization=QuantizationConfig() if bits == 4 else None, device=device,
            sharded=True, share=ShardSpec(rank, world_size) if cut else None,
        )  # fmt: skip
        loaded = time.perf_counter() - started
    with Peak() as later:
        llm = attach_adapter(llm, {'type': LoraConfig, 'r': 8, 'target_modules': 'all-linear'})
        model = FullyShard(rank, world_size).wrap(SupervisedFinetune(llm))
    assert all(isinstance(p, DTensor) for p in model.llm.base_model.model.model.layers.parameters())
    found = {'peak_loading_gib': (peak.largest - peak.before) / GIB, 'loaded_gib': (peak.after - peak.before) / GIB,
             'peak_sharding_gib': (later.largest - peak.before) / GIB, 'kept_gib': (later.after - peak.before) / GIB,
             'loaded_s': loaded}  # fmt: skip
    if device == 'cuda':
        found |= {'card_peak_gib': torch.cuda.max_memory_allocated() / GIB,
                  'card_kept_gib': torch.cuda.memory_allocated() / GIB}  # fmt: skip
    return found


def work(rank: int, world_size: int, port: int, folder: Path, bits: int, cut: bool, device: str, out: Any) -> None:
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size),
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}  # fmt: skip
    import torch

    from xtuner.engine.distributed.launch import process_group

    torch.set_num_threads(1)
    with process_group('pytorch'):
        torch.zeros(1, device=device)
        out.put(load(folder, bits, cut, device, rank, world_size))


def measure(folder: Path, world_size: int, bits: int, cut: bool, device: str) -> dict[str, Any]:
    context = multiprocessing.get_context('spawn')
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    out = context.Queue()
    ranks = [
        context.Process(target=work, args=(rank, world_size, port, folder, bits, cut, device, out))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found = [out.get(timeout=500) for _ in ranks]
    for process in ranks:
        process.join()
    return {name: round(max(each[name] for each in found), 3) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--words', type=int, default=8192)
    parser.add_argument('--ranks', default='2,4')
    parser.add_argument('--bits', default='4,16')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    from benchmarks.internlm_7b import write_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / 'tokenizer.model'
        tokenizer.touch()  # not read here
        folder = write_checkpoint(
            Path(temporary) / 'model', tokenizer, num_hidden_layers=args.layers, vocab_size=args.words
        )
        size = sum(file.stat().st_size for file in folder.glob('*.bin')) / GIB
        print(f'{args.layers} layers of 4096 x 11008, {args.words} words, {size:.2f} GiB in float16', flush=True)
        for world_size in map(int, args.ranks.split(',')):
            for bits in map(int, args.bits.split(',')):
                for cut in (False, True):
                    figures = measure(folder, world_size, bits, cut, args.device)
                    print(json.dumps({'ranks': world_size, 'bits': bits, 'cut_while_loading': cut, **figures}),
                          flush=True)  # fmt: skip


if __name__ == '__main__':
    main()
