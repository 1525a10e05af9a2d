"""Times the rendering of a tokenizer's chat template in the processes for it against rendering in this process.

    python benchmarks/render_templates.py DATA.jsonl [--records 1000000] [--rounds 3] [--batches 1 16 64 256]

DATA.jsonl holds `question` and `answer`, one a line; it is read over and over until there are enough records. Each is
rendered as training needs it: whole, up to the answer's prompt, and up to the answer's end. Printed are microseconds a
record by the clock and of processor time, of both processes together; the least of the rounds, since another process
can only make a round slower. Then the same records are prepared, from the file to packs on disk, with a template that
needs no rendering elsewhere and with the tokenizer's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import cycle, islice
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates import rendering
from xtuner.dataset.templates.builtin import get_template
from xtuner.dataset.templates.rendering import Chat, ChatTemplate, render_chats
from xtuner.dataset.templates.worker_pool import POOL

VIEWS = [(2, False), (1, True), (2, False)]


def main() -> None:
    args = parse_args()
    rows = [json.loads(line) for line in args.data.open(encoding='utf-8')]
    tokenizer = make_tokenizer([row['answer'] for row in rows])
    print(
        f'{date.today()}  {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; '
        f'python {platform.python_version()}, jinja2 {jinja2.__version__}, transformers {transformers.__version__}'
    )
    print(
        f'{args.records:,} records of {sum(len(r["question"] + r["answer"]) for r in rows) / len(rows):.0f} characters'
    )
    ways = {'in this process': lambda: in_process(tokenizer, chats(rows, args.records))}
    for size in args.batches:
        ways[f'elsewhere, {size} at a time'] = lambda size=size: elsewhere(tokenizer, chats(rows, args.records), size)
    for name, way in ways.items():
        times = [timed(way) for _ in range(args.rounds)]
        wall, cpu = min(wall for wall, _ in times), min(cpu for _, cpu in times)
        print(f'{name:25} {1e6 * wall / args.records:8.1f} us wall {1e6 * cpu / args.records:8.1f} us CPU a record')
    compare_preparation(tokenizer, rows, args)
    print(f'peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('--records', type=int, default=1_000_000)
    parser.add_argument('--prepared', type=int, default=100_000, help='records that are prepared')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 16, 64, 256])
    return parser.parse_args()


def processor() -> str:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.machine())


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template of ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<|im_end|>')
    tokenizer.chat_template = get_template('qwen_chat').chat_template()
    return tokenizer


def chats(rows: list[dict[str, str]], count: int) -> Iterator[Chat]:
    for row in islice(cycle(rows), count):
        messages = [{'role': 'user', 'content': row['question']}, {'role': 'assistant', 'content': row['answer']}]
        yield Chat(messages, None, VIEWS, 'x')


def in_process(tokenizer: PreTrainedTokenizerFast, wanted: Iterator[Chat]) -> None:
    for chat in wanted:
        for count, prompt in VIEWS:
            tokenizer.apply_chat_template(chat.messages[:count], add_generation_prompt=prompt, tokenize=False)


def elsewhere(tokenizer: PreTrainedTokenizerFast, wanted: Iterator[Chat], size: int) -> None:
    rendering._BATCH = size
    template = ChatTemplate(tokenizer.chat_template, 'x', tokenizer.special_tokens_map)
    for texts in render_chats(template, wanted):
        assert isinstance(texts, list)
    POOL.close()  # reaped, so that its processor time counts


def timed(way: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), processor_time()
    way()
    return time.perf_counter() - wall, processor_time() - cpu


def processor_time() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def compare_preparation(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], args: argparse.Namespace
) -> None:
    rendering._BATCH = 64
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data.jsonl'
        with data.open('w', encoding='utf-8') as file:
            for number, chat in enumerate(chats(rows, args.prepared)):
                file.write(json.dumps({'id': number, 'messages': chat.messages}) + '\n')
        for name in ('qwen_chat', 'from_tokenizer'):
            template = get_template(name, tokenizer)
            times = []
            for number in range(args.rounds):
                config = DatasetConfig(source=str(data), cache_dir=f'{folder}/{name}{number}')
                times.append(timed(lambda config=config: prepare(config, tokenizer, template)))  # noqa: B023
            wall, cpu = min(wall for wall, _ in times), min(cpu for _, cpu in times)
            print(
                f'prepared with {name:15} {1e6 * wall / args.prepared:8.1f} us wall '
                f'{1e6 * cpu / args.prepared:8.1f} us CPU a record'
            )


def prepare(config: DatasetConfig, tokenizer: PreTrainedTokenizerFast, template: object) -> None:
    prepare_dataset(config, tokenizer=tokenizer, template=template)
    POOL.close()


if __name__ == '__main__':
    main()
