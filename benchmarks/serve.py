"""The service: tokens a second of one stream and of 16, and what it bears.

    python benchmarks/serve.py speed     # the command as a process, over HTTP on loopback, a small model on the CPU
    python benchmarks/serve.py load      # 64 clients for 120 s: answers, disconnects, oversized and malformed bodies
    python benchmarks/serve.py decode    # the decoding thread alone; on a GPU InternLM-7B's shape in 4 bit

`speed` and `decode` time streams that begin together, from the first request to the last token, the median of some
rounds after one that is not counted; the ratio is of one run. `load` counts what every client saw, by kind, and reads
the service's memory from the system: once after the first 10 s, when all its buffers have been used, and at the end.
Each prints JSON lines, the last one with all. `--hidden` and `--layers` are of the model on a CPU, else the demo's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@contextmanager
def service(folder: Path, *words: str) -> Iterator[tuple[int, int]]:
    """`xtuner serve` on a free port of this machine alone; yields the port and the process's id."""
    command = [sys.executable, '-m', 'xtuner.cli.main', 'serve', str(folder), '--port', '0', *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {'XTUNER_API_KEY': ''})
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r'serving at http://127\.0\.0\.1:(\d+)', line):
                break
        else:
            raise SystemExit('the service did not start')
        threading.Thread(target=process.stderr.read, daemon=True).start()  # nobody else empties the pipe
        yield int(found.group(1)), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f'the service ended with status {process.returncode}')
    finally:
        process.kill()


async def send(port: int, body: bytes, *, path: str = '/v1/chat/completions') -> tuple[Any, Any]:
    """Sends one request on a connection of its own."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    head = f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n' \
           f'Content-Length: {len(body)}\r\n\r\n'  # fmt: skip
    writer.write(head.encode() + body)
    return reader, writer


async def read_answer(port: int, fields: dict[str, Any]) -> tuple[int, bytes]:
    """The status and the whole response."""
    reader, writer = await send(port, json.dumps(fields).encode())
    content = await reader.read()
    writer.close()
    return int(content.split(b' ', 2)[1]), content


def fields(model: str, text: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    # At this temperature a tiny model's answers hardly ever end before their greatest length.
    return {'model': model, 'messages': [{'role': 'user', 'content': text}], 'max_tokens': max_tokens,
            'temperature': 1.0, 'stream': True, 'stream_options': {'include_usage': True}} | more  # fmt: skip


async def streams_over_http(port: int, model: str, num: int, num_tokens: int) -> float:
    """Tokens a second of some streams that begin together."""
    began = time.perf_counter()
    answers = await asyncio.gather(
        *(read_answer(port, fields(model, f'Tell me about {n}.', num_tokens, temperature=0)) for n in range(num))
    )
    seconds = time.perf_counter() - began
    drawn = [int(re.findall(rb'"completion_tokens":(\d+)', content)[-1]) for _, content in answers]
    return sum(drawn) / seconds


def medians(measure: Callable[[int], float], num_streams: int, rounds: int = 3) -> dict[str, Any]:
    """One stream and several in turn; the first round is not counted."""
    rates: dict[int, list[float]] = {1: [], num_streams: []}
    for number in range(rounds + 1):
        for num, found in rates.items():
            rate = measure(num)
            print(f'round {number}, {num} at a time: {rate:.1f} tokens/s', file=sys.stderr, flush=True)
            if number:
                found.append(rate)
    one, many = (statistics.median(found) for found in rates.values())
    return {'1_tokens_s': round(one, 1), f'{num_streams}_tokens_s': round(many, 1), 'ratio': round(many / one, 2)}


def shape(args: argparse.Namespace) -> dict[str, int]:
    """Of the model on a CPU."""
    return {'hidden_size': args.hidden, 'intermediate_size': 43 * args.hidden // 16, 'num_hidden_layers': args.layers,
            'num_attention_heads': args.hidden // 64, 'num_key_value_heads': args.hidden // 64}  # fmt: skip


def speed(args: argparse.Namespace) -> dict[str, Any]:
    from demo.base import CONFIG, write_base_model

    CONFIG.update(shape(args))
    with tempfile.TemporaryDirectory() as folder:
        model = write_base_model(Path(folder) / 'tiny')
        words = ['--prompt-template', 'internlm_chat', '--max-streams', str(args.streams)]
        with service(model, *words) as (port, _):
            found = medians(lambda num: asyncio.run(streams_over_http(port, 'tiny', num, args.tokens)), args.streams,
                            args.rounds)  # fmt: skip
    return {'what': f'over HTTP, {args.layers} layers of {args.hidden} on the CPU'} | found


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """As served first (weights kept), then as loaded; each line is printed as it comes."""
    import torch

    from benchmarks.qlora_model import add_adapter, build_base
    from xtuner.inference.weight_cache import cache_weights

    began = time.perf_counter()
    if torch.cuda.is_available():
        model = build_base('cuda', max_position_embeddings=2048).eval()
        found: dict[str, Any] = {'device': torch.cuda.get_device_name(), 'model': '7B shape, NF4'}
    else:
        model = build_base('cpu', dtype=torch.float32, quantise=False, vocab_size=2048, **shape(args)).eval()
        found = {'device': 'cpu', 'model': f'{args.layers} layers of {args.hidden}, float32'}
    print(json.dumps(found | {'built_s': round(time.perf_counter() - began, 1)}), flush=True)
    for label in ('base', 'adapter'):
        if label == 'adapter':
            model = add_adapter(model).eval()
        for form in ('kept', 'as loaded'):
            if form == 'kept':
                cache_weights(model)
            found[f'{label}, {form}'] = rates = decoding_rates(model, args)
            print(json.dumps({f'{label}, {form}': rates, 's': round(time.perf_counter() - began, 1)}), flush=True)
            for module in model.modules():
                module.__dict__.pop('forward', None)
    return found


def decoding_rates(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second; on a GPU memory too, and whether its steps were recorded."""
    import torch

    from xtuner.inference.batching import BatchDecoder

    decoder = BatchDecoder(model, num_slots=args.streams, max_length=1024)
    found = medians(lambda num: streams_alone(decoder, num, args.tokens), args.streams, args.rounds)
    if decoder._graphs is not None:
        found['gib'] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found['recorded'] = decoder._graphs.reason_disabled or len(decoder._graphs._recorded)
        found['recorded_differs'] = recorded_differs(decoder)
        torch.cuda.reset_peak_memory_stats()
    return found


def recorded_differs(decoder: Any) -> float:
    """The largest difference of a recorded step's logits from the step's own, over the largest logit."""
    lengths = list(range(20, 20 + decoder.num_slots))
    decoder.prefill([[7 * n % 2000 + 5 for n in range(length)] for length in lengths], slot=0)
    ids = [11 * n + 5 for n in range(decoder.num_slots)]
    recorded = decoder.step(ids, lengths, slot=0, exclusive=True).clone()
    own = decoder.step(ids, lengths, slot=0)
    return round(float((recorded - own).abs().amax() / own.abs().amax()), 5)


def streams_alone(decoder: Any, num: int, num_tokens: int) -> float:
    """Tokens a second of some answers that begin together, from the thread that draws them."""
    from xtuner.inference.detokenizer import IncrementalDetokenizer
    from xtuner.inference.generate import Sampling
    from xtuner.inference.request import Events, GenerationRequest
    from xtuner.inference.scheduler import Scheduler

    finished = threading.Semaphore(0)

    def deliver(events: Events) -> None:
        for _, piece in events:
            if piece.finish:
                finished.release()

    class Numbers:
        def decode(self, ids: Any, **_: Any) -> str:
            return ' '.join(map(str, ids))

    scheduler = Scheduler(decoder, adapters=[None], use=lambda _: None, deliver=deliver, max_waiting=num)
    prompts = [[random.Random(n).randrange(5, 2000) for _ in range(32)] for n in range(num)]
    answers = [GenerationRequest(None, prompt, Sampling(num_tokens, 0.0), frozenset(),
                                 IncrementalDetokenizer(Numbers()), n) for n, prompt in enumerate(prompts)]  # fmt: skip
    scheduler.start()
    began = time.perf_counter()
    scheduler.submit(answers)
    for _ in range(num):
        finished.acquire()
    seconds = time.perf_counter() - began
    scheduler.stop()
    assert scheduler.num_failures == 0 and all(answer.num_tokens == num_tokens for answer in answers)
    return num * num_tokens / seconds


# Under load


async def client(port: int, number: int, until: float, seen: Counter[str], waits: list[float]) -> None:
    """One client that does this and that until the time is up."""
    dice = random.Random(number)
    kinds = ['stream'] * 8 + ['whole'] * 4 + ['leave', 'leave', 'leave before', 'malformed', 'oversized', 'half',
             'wrong', 'raw bytes', 'unknown model', 'too long']  # fmt: skip
    while time.monotonic() < until:
        kind = dice.choice(kinds)
        try:
            seen[f'{kind}: {await asyncio.wait_for(act(port, kind, dice, waits), 60)}'] += 1
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, IndexError, ValueError) as error:
            seen[f'{kind}: {type(error).__name__}'] += 1


async def act(port: int, kind: str, dice: random.Random, waits: list[float]) -> str:
    """Does one thing and says what came of it."""
    text = 'word ' * dice.randrange(1, 60)
    asked = fields('tiny', text, dice.randrange(1, 200), stream=kind != 'whole')
    if kind in ('stream', 'whole'):
        began = time.monotonic()
        status, content = await read_answer(port, asked if kind == 'stream' else asked | {'stream_options': None})
        whole = b'[DONE]' in content if kind == 'stream' else b'"finish_reason":' in content
        if status == 200:
            waits.append(time.monotonic() - began)
        if status == 429:
            await asyncio.sleep(dice.random() / 2)
        return f'{status}' if whole or status == 429 else f'{status} torn'
    if kind in ('leave', 'leave before'):
        reader, writer = await send(port, json.dumps(asked | {'max_tokens': 400}).encode())
        status = await reader.readline() if kind == 'leave' else b' gone '
        if b' 200 ' in status:
            await reader.readuntil(b'"content":')
        writer.transport.abort()
        return status.split(b' ')[1].decode()
    if kind == 'half':
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                     b'Content-Length: 1000\r\n\r\n{"model": "tiny"')  # fmt: skip
        await asyncio.sleep(dice.random())
        writer.transport.abort()
        return 'gone'
    if kind == 'raw bytes':
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        writer.write(dice.randbytes(200) + b'\r\n\r\n')
        answer = await reader.read(100)
        writer.close()
        return answer.split(b' ', 2)[1].decode() if answer else 'closed'
    bodies: dict[str, Callable[[], bytes]] = {
        'malformed': lambda: json.dumps(asked).encode()[: dice.randrange(1, 60)],
        'oversized': lambda: b'{"model": "' + b'x' * 3_000_000,
        'wrong': lambda: json.dumps(asked | {'temperature': 'hot'}).encode(),
        'unknown model': lambda: json.dumps(asked | {'model': 'gpt-9'}).encode(),
        'too long': lambda: json.dumps(asked | {'messages': [{'role': 'user', 'content': 'word ' * 9000}]}).encode(),
    }
    reader, writer = await send(port, bodies[kind]())
    content = await reader.read()
    writer.close()
    return content.split(b' ', 2)[1].decode()


def memory_mib(process: int) -> dict[str, float]:
    """Resident memory, threads and open files of a process, from the system."""
    status = Path(f'/proc/{process}/status').read_text(encoding='utf-8')
    found = dict(re.findall(r'^(VmRSS|Threads):\s+(\d+)', status, re.M))
    files = len(list(Path(f'/proc/{process}/fd').iterdir()))
    return {'rss_mib': round(int(found['VmRSS']) / 1024, 1), 'threads': int(found['Threads']), 'files': files}


async def under_load(port: int, process: int, num_clients: int, seconds: float) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    waits: list[float] = []
    until = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(port, n, until, seen, waits)) for n in range(num_clients)]
    memory = {}
    await asyncio.sleep(10)
    memory['after_10_s'] = memory_mib(process)
    await asyncio.gather(*tasks)
    memory['under_load'] = memory_mib(process)
    await asyncio.sleep(1)
    status, content = await health(port)
    assert b'"running":0,"waiting":0' in content, content
    memory['idle_after'] = memory_mib(process)
    found = {'requests': sum(seen.values()), 'seen': dict(sorted(seen.items())), 'memory': memory, 'health': status}
    waits.sort()
    found['answer_s'] = {'median': round(waits[len(waits) // 2], 2), 'p95': round(waits[len(waits) * 95 // 100], 2)}
    return found


async def health(port: int) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
    content = await reader.read()
    writer.close()
    return int(content.split(b' ', 2)[1]), content


def load(args: argparse.Namespace) -> dict[str, Any]:
    from demo.base import write_base_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_base_model(Path(folder) / 'tiny')
        words = ['--prompt-template', 'internlm_chat', '--max-waiting', '32']
        with service(model, *words) as (port, process):
            found = asyncio.run(under_load(port, process, args.clients, args.seconds))
    return {'what': f'{args.clients} clients for {args.seconds:g} s'} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('speed', 'load', 'decode'))
    parser.add_argument('--streams', type=int, default=16)
    parser.add_argument('--tokens', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--hidden', type=int, default=256)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--clients', type=int, default=64)
    parser.add_argument('--seconds', type=float, default=120)
    args = parser.parse_args()
    print(json.dumps({'speed': speed, 'load': load, 'decode': decode}[args.what](args)))


if __name__ == '__main__':
    main()
