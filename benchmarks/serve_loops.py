"""The service under 64 clients, some of whom send the message on which the model's own chat template never ends.

    python benchmarks/serve_loops.py work_dirs/demo/merged [--clients 64] [--loopers 6] [--seconds 120] [--grace 5]

The model is copied, and its template gets a loop in front that runs where the last message is `loop`. The loopers send
nothing else; the other clients ask for streams and whole answers, and leave some streams after the first token. What
every client saw is counted by kind, memory and processes are read from the system, and at the end, with streams and
loops under way, the seconds from SIGTERM to the end of the process. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serve import fields, health, memory_mib, read_answer, send, service

_LOOP = (
    "{%- if messages[-1]['content'] == 'loop' -%}{%- for a in range(99999) -%}{%- for b in range(99999) -%}"
    '{%- for c in range(99999) -%}{%- endfor -%}{%- endfor -%}{%- endfor -%}{%- endif -%}'
)
_PATIENCE_S = 90.0  # a request that takes longer hangs


def looping_model(model: Path, folder: Path) -> Path:
    """A copy of a model whose own template loops, and of which nothing says that it has another one."""
    copy = shutil.copytree(model, folder / 'looping', ignore=shutil.ignore_patterns('xtuner.json'))
    template = copy / 'chat_template.jinja'
    template.write_text(_LOOP + template.read_text(encoding='utf-8'), encoding='utf-8')
    return copy


class Seen:
    """What the clients saw: how often each outcome of each kind of request, and how long those with status 200 took."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def summary(self) -> dict[str, Any]:
        """All of it."""
        times = {}
        for kind, found in sorted(self.seconds.items()):
            found.sort()
            middle, high = (found[len(found) * share // 100] for share in (50, 95))
            times[kind] = {'p50_s': round(middle, 2), 'p95_s': round(high, 2), 'max_s': round(found[-1], 2)}
        return {'requests': sum(self.counts.values()), 'seen': dict(sorted(self.counts.items())), 'times': times}


async def client(port: int, number: int, loops: bool, until: float, seen: Seen) -> None:
    """Asks until the time is up."""
    dice = random.Random(number)
    while time.monotonic() < until:
        kind = 'loop' if loops else dice.choice(['stream'] * 5 + ['chat'] * 3 + ['leave'] * 2)
        began = time.monotonic()
        try:
            status = await asyncio.wait_for(act(port, kind, dice), _PATIENCE_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, IndexError, ValueError) as error:
            status = type(error).__name__
        seen.counts[f'{kind}: {status}'] += 1
        if status.startswith(('200', '400')):
            seen.seconds[kind].append(time.monotonic() - began)
        if status in ('429', '503'):
            await asyncio.sleep(dice.random())


async def act(port: int, kind: str, dice: random.Random) -> str:
    """Sends one request and says what came of it."""
    text = 'loop' if kind == 'loop' else f'What is {dice.randrange(1000)} and {"more " * dice.randrange(20)}?'
    asked = fields('looping', text, dice.randrange(8, 64))
    if kind == 'chat':
        asked |= {'stream': False, 'stream_options': None}
    if kind == 'leave':
        reader, writer = await send(port, json.dumps(asked | {'max_tokens': 400}).encode())
        status = (await reader.readline()).split(b' ')[1].decode()
        if status == '200':
            await reader.readuntil(b'"content":')
        writer.transport.abort()
        return status
    status, content = await read_answer(port, asked)
    if kind == 'loop':
        return f'{status}' if b'chat template' in content else f'{status} without the reason'
    whole = b'[DONE]' in content if kind == 'stream' else b'"finish_reason":' in content
    return f'{status}' if whole or status != 200 else f'{status} torn'


async def under_load(port: int, process: int, args: argparse.Namespace) -> dict[str, Any]:
    seen, unhealthy = Seen(), 0
    memory = {'before': memory_mib(process)}
    until = time.monotonic() + args.seconds
    tasks = [asyncio.create_task(client(port, n, n < args.loopers, until, seen)) for n in range(args.clients)]
    half = time.monotonic() + args.seconds / 2
    while time.monotonic() < until:
        await asyncio.sleep(5)
        unhealthy += (await health(port))[0] != 200
        if 'half_way' not in memory and time.monotonic() > half:
            memory['half_way'] = memory_mib(process)
    await asyncio.gather(*tasks)
    memory['at_the_end'] = memory_mib(process)
    await asyncio.sleep(15)  # the longest that a rendering may take by the clock
    status, content = await health(port)
    memory['idle_after'] = memory_mib(process) | {'renderers': num_children(process)}
    found = {'unhealthy': unhealthy, 'idle': f'{status} {content.partition(b"{")[2].decode()}', 'memory': memory}
    return seen.summary() | found


def num_children(process: int) -> int:
    """Processes that the service has started and that live."""
    return len(Path(f'/proc/{process}/task/{process}/children').read_text(encoding='utf-8').split())


def begin(port: int, text: str) -> socket.socket:
    """Sends a request whose answer is not waited for."""
    body = json.dumps(fields('looping', text, 1500)).encode()
    connection = socket.create_connection(('127.0.0.1', port))
    connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                       b'Content-Length: %d\r\n\r\n' % len(body) + body)  # fmt: skip
    return connection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('--clients', type=int, default=64)
    parser.add_argument('--loopers', type=int, default=6)
    parser.add_argument('--seconds', type=float, default=120)
    parser.add_argument('--grace', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = looping_model(args.model, Path(folder))
        with service(model, '--grace', str(args.grace)) as (port, process):
            found = asyncio.run(under_load(port, process, args))
            held = [begin(port, text) for text in ['Tell me everything.'] * 8 + ['loop'] * 4]
            time.sleep(1)
            ending = time.monotonic()
        found['sigterm_s'] = round(time.monotonic() - ending, 2)
    for connection in held:
        connection.close()
    print(json.dumps({'what': f'{args.clients} clients, {args.loopers} of them loop, {args.seconds:g} s'} | found))


if __name__ == '__main__':
    main()
