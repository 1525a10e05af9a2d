"""Greedy decoding at batch 1: ours against transformers' own `generate`, in 4 bit, with and without an adapter.

    python benchmarks/decode.py            # GPU: InternLM-7B's shape; CPU: the demo's model. Random weights
    python benchmarks/decode.py --fresh    # the first token of a fresh process alone, after the model is there

Speeds are medians of several answers, tokens a second without the first; `ttft` is the time to the first token of a
long prompt, when the 4-bit weights have stayed as floats since an earlier one and when not. `limit` is what the
products of that prompt take at the speed that this GPU reaches in one large product.
`agree` is how many tokens agree with transformers' before the first that differs; `logits` how far ours and its own
are from float32's, relative. On a CPU the demo's model in 4 bit does not agree, because bitsandbytes' own CPU kernel is
wrong for its 688 wide rows. Prints one JSON line for each model.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.qlora_model import add_adapter, build_base
from xtuner.inference.decode import decoder as decoding
from xtuner.inference.decode.decoder import find_decoder, release
from xtuner.inference.generate import Sampling, generate, generate_with_transformers

ON_GPU = torch.cuda.is_available()
STOP = 4  # no model here says it


class Clock:
    """Takes the time of each token, as a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then tokens."""
        value.reshape(-1).tolist()  # whoever shows a token waits for it
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def timed(how: Callable, model: Any, prompt: list[int], num_tokens: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, tokens a second after it, and the answer."""
    clock = Clock()
    started = time.perf_counter()
    sampling = Sampling(num_tokens, temperature=0)
    ids = how(model, prompt, stop_ids=[STOP], sampling=sampling, streamer=clock)
    times = clock.times[1:]  # the prompt is the first that it is given
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float('nan')
    return times[0] - started, rate, ids


def prompt_of(length: int, words: int) -> list[int]:
    return torch.randint(5, words, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def forget(model: Any) -> None:
    """The next prompt is computed whole, though its beginning has been seen."""
    decoder: Any = find_decoder(model, 8)
    decoder._ids = []


def small_base(folder: str, bits: int | None) -> Any:
    from demo.base import write_base_model
    from xtuner.config.schema import QuantizationConfig
    from xtuner.model.loading import load_model

    quantization = QuantizationConfig(bits=bits) if bits else None
    return load_model(write_base_model(folder), dtype=torch.float32, quantization=quantization)


def large_base() -> Any:
    model = build_base('cuda', max_position_embeddings=4096)
    model.config.use_cache = model.generation_config.use_cache = True
    return model.eval()


def product_speed() -> float:
    """FLOP/s of one large bfloat16 product, the best of some."""
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    best = float('inf')
    for _ in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / best


def measure(name: str, model: Any, num_tokens: int, long: int, rounds: int) -> dict[str, Any]:
    words = model.config.vocab_size
    short = prompt_of(20, words)
    found: dict[str, Any] = {'model': name, 'device': torch.cuda.get_device_name() if ON_GPU else 'cpu'}
    answers = {}
    for label, how in (('plain', generate_with_transformers), ('ours', generate)):
        timed(how, model, short, 8)
        rates, first = [], []
        for _ in range(rounds):
            _, rate, answers[label] = timed(how, model, short, num_tokens)
            rates.append(rate)
        for _ in range(rounds + 1):
            if how is generate:
                forget(model)
            first.append(timed(how, model, prompt_of(long, words), 1)[0])
        found[f'{label}_tokens_s'] = round(statistics.median(rates), 1)
        found[f'{label}_ttft_s'] = round(statistics.median(first[1:]), 4)
    found['ratio'] = round(found['ours_tokens_s'] / found['plain_tokens_s'], 2)
    pairs = zip(answers['plain'], answers['ours'], strict=False)
    found['agree'] = next((i for i, (a, b) in enumerate(pairs) if a != b), num_tokens)
    if ON_GPU:
        found['allocated_gib'] = round(torch.cuda.memory_allocated() / 2**30, 2)
        found['ours_ttft_no_floats_s'] = round(without_floats(model, prompt_of(long, words), rounds), 4)
        found |= limits(model, long, found['ours_ttft_s']) | {'logits': logit_errors(model, short)}
        found['peak_gib'] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    release(model)
    return found


def without_floats(model: Any, prompt: list[int], rounds: int) -> float:
    """Seconds to the first token where no weights may stay as floats: on a small card, or a first prompt."""
    release(model)
    with patch.object(decoding, '_CACHE_FRACTION', 0.0):
        times = []
        for _ in range(rounds + 1):
            times.append(timed(generate, model, prompt, 1)[0])
            forget(model)
    release(model)
    return statistics.median(times[1:])


def limits(model: Any, long: int, seconds: float) -> dict[str, Any]:
    """The prompt's products at the speed of a large one."""
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    config = causal.config
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    adapters = sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n)
    products = 2 * long * (config.num_hidden_layers * layer + adapters) + 2 * config.hidden_size * config.vocab_size
    attention = 2 * long * long * config.hidden_size * config.num_hidden_layers  # causal: half of four
    speed = product_speed()
    limit = (products + attention) / speed
    return {'tflops': round(speed / 1e12), 'limit_s': round(limit, 4), 'of_limit': round(seconds / limit, 2)}


@torch.inference_mode()
def logit_errors(model: Any, prompt: list[int]) -> dict[str, float]:
    """How far the logits of the prompt's last token are from those of products in float32 over the same weights."""
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    ids = torch.tensor([prompt], device='cuda')
    with torch.autocast('cuda', torch.bfloat16):
        plain = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    decoder: Any = find_decoder(model, 8)
    decoder._ids = []
    decoder._prepare(len(prompt) + 8)
    whole = decoder._prefill(prompt)[0].double()
    decoder._ids = []
    decoder._prefill(prompt[:-1])
    step = decoder._token_step()
    assert step is not None
    step.token.fill_(prompt[-1])
    step.position.fill_(len(prompt) - 1)
    stepped = step.replay()[0].double()
    exact = float32_logits(model, causal, ids)
    pairs = (('plain', plain), ('prompt', whole), ('step', stepped))
    return {label: float(f'{float((got - exact).norm() / exact.norm()):.2e}') for label, got in pairs}


def float32_logits(model: Any, causal: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's own forward pass in float32: its 4-bit layers compute in it, all else is turned into it."""
    changed = [m for m in causal.modules() if hasattr(m, 'compute_dtype')]
    halves = [p for p in causal.parameters() if p.dtype == torch.bfloat16]
    for module in changed:
        module.compute_dtype = torch.float32
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        return model(input_ids=ids, use_cache=False).logits[0, -1].double()
    finally:
        for module in changed:
            module.compute_dtype = torch.bfloat16
        for parameter in halves:
            parameter.data = parameter.data.bfloat16()
        release(model)


def fresh() -> dict[str, Any]:
    """The first token after the model is there: nothing has run in this process but its making."""
    model = large_base()
    torch.cuda.synchronize()
    prompt = prompt_of(20, model.config.vocab_size)
    profiler = cProfile.Profile()
    first = profiler.runcall(timed, generate, model, prompt, 1)[0]
    pstats.Stats(profiler, stream=sys.stderr).sort_stats('tottime').print_stats(14)
    forget(model)
    again = timed(generate, model, prompt, 1)[0]
    started = time.perf_counter()
    _, rate, _ = timed(generate, model, prompt, 32)
    seconds = time.perf_counter() - started
    return {
        'fresh': True, 'first_token_s': round(first, 3), 'first_token_again_s': round(again, 3),
        'first_32_tokens_s': round(seconds, 3), 'tokens_s_with_recording': round(rate, 1),
    }  # fmt: skip


def profile(model: Any, long: int) -> None:
    """The kernels of 20 tokens and those of a long prompt, by time, to stderr."""
    prompts = prompt_of(20, model.config.vocab_size), prompt_of(long, model.config.vocab_size)
    for prompt, num_tokens in zip(prompts, (21, 1), strict=True):
        timed(generate, model, prompt, num_tokens)
        forget(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            timed(generate, model, prompt, num_tokens)
        table = seen.key_averages().table(sort_by='cuda_time_total', row_limit=14, max_name_column_width=44)
        print('\n'.join(line[:46] + line[-75:] for line in table.splitlines()), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=128 if ON_GPU else 100)
    parser.add_argument('--prompt', type=int, default=2000 if ON_GPU else 500, help='tokens of the long prompt')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--fresh', action='store_true')
    parser.add_argument('--profile', action='store_true')
    args = parser.parse_args()
    if args.fresh:
        print(json.dumps(fresh()))
        return
    if ON_GPU:
        model = large_base()
        print(json.dumps(measure('7B, 4 bit', model, args.tokens, args.prompt, args.rounds)), flush=True)
        if args.profile:
            profile(model, args.prompt)
        adapted = add_adapter(model).eval().requires_grad_(False)  # as chat loads it
        print(json.dumps(measure('7B, 4 bit, adapter', adapted, args.tokens, args.prompt, args.rounds)), flush=True)
        if args.profile:
            profile(adapted, args.prompt)
        return
    for name, bits in (('demo, float32', None), ('demo, 4 bit', 4)):
        with tempfile.TemporaryDirectory() as folder:
            model = small_base(folder, bits)
        print(json.dumps(measure(name, model, args.tokens, args.prompt, args.rounds)), flush=True)
    adapted = add_adapter(model, rank=16).eval()
    print(json.dumps(measure('demo, 4 bit, adapter', adapted, args.tokens, args.prompt, args.rounds)), flush=True)


if __name__ == '__main__':
    main()
