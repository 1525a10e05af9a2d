"""Times loading a model in 4 bit, and the first token of `stream_chat` after it.

    python benchmarks/internlm_7b.py MODEL --tokenizer tokenizer.model    # once
    python benchmarks/load_and_chat.py MODEL

Loads it twice: the first time the files may have to come from the disk. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from xtuner.config.schema import QuantizationConfig
from xtuner.model.loading import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    folder = parser.parse_args().model
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    found: dict[str, object] = {'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}
    for attempt in ('first', 'second'):
        started = time.perf_counter()
        tokenizer = load_tokenizer(folder)
        loaded_tokenizer = time.perf_counter()
        model = load_model(folder, dtype=dtype, quantization=QuantizationConfig(), device=device)
        if device == 'cuda':
            torch.cuda.synchronize()
        ready = time.perf_counter()
        stream = model.stream_chat(tokenizer, 'Hello', history=[], max_new_tokens=32)
        next(stream)
        first_token = time.perf_counter()
        num_more = sum(1 for _ in stream)
        found[attempt] = {
            'tokenizer_s': round(loaded_tokenizer - started, 2),
            'model_s': round(ready - loaded_tokenizer, 2),
            'first_token_s': round(first_token - ready, 2),
            'further_responses': num_more,
            'further_s': round(time.perf_counter() - first_token, 2),
        }
        if device == 'cuda':
            found['allocated_gib'] = round(torch.cuda.memory_allocated() / 2**30, 2)
            del model, stream
            torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
