"""Times the preparation of GSM8K against a bare batch encode and against the classic way, on the same cores.

    python benchmarks/prepare_data.py MODEL_FOLDER DATA.jsonl [--rounds 5] [--classic] [--memory]

MODEL_FOLDER holds the tokenizer. Each round runs all ways in turn; the least time of each counts, since another process
can only make a round slower. CPU seconds are those of this process, all threads.

- bare: one `encode_batch` of the rendered texts by the tokenizers library, and nothing else.
- ours: `prepare_dataset` from a file to packs on disk, in a fresh cache; warm: the same again.
- classic: a sentencepiece tokenizer called once a turn under `datasets.map`, then packing under `map`,
  with the same stages in between.
- memory: peak resident memory of preparing the file once, and ten times over, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

MAX_LENGTH = 2048


def main() -> None:
    args = parse_args()
    if args.once:
        print(json.dumps(measure_memory(args)))
        return
    from xtuner.dataset.templates.builtin import get_template
    from xtuner.model.loading import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    template = get_template('internlm_chat', tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        ways = {'bare': bare_way(tokenizer, args.data), 'ours': our_way(tokenizer, template, args.data, Path(folder)),
                'warm': warm_way(tokenizer, template, args.data, Path(folder))}  # fmt: skip
        results = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                results[name].append(timed(way))
        if args.classic:
            classic = classic_way(args.model, args.data, Path(folder))
            results['classic'] = [timed(classic, fresh=Path(folder) / 'classic') for _ in range(2)]
    for name, times in results.items():
        wall, cpu = min(t for t, _ in times), min(c for _, c in times)
        print(f'{name:8} {wall:7.2f} s wall {cpu:7.2f} s CPU   all: {" ".join(f"{t:.2f}" for t, _ in times)}')
    least = {name: min(t for t, _ in times) for name, times in results.items()}
    print(f'ours / bare {least["ours"] / least["bare"]:.2f}')
    if args.classic:
        print(f'classic / ours {least["classic"] / least["ours"]:.1f}')
    if args.memory:
        report_memory(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('data', type=Path)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--classic', action='store_true')
    parser.add_argument('--memory', action='store_true')
    parser.add_argument('--once', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(way: Callable[[], None], *, fresh: Path | None = None) -> tuple[float, float]:
    if fresh:
        shutil.rmtree(fresh, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare_way(tokenizer, data: Path) -> Callable[[], None]:
    rows = [json.loads(line) for line in data.open(encoding='utf-8')]
    texts = [f'<|User|>:{row["question"]}<eoh>\n<|Bot|>:{row["answer"]}<eoa>' for row in rows]

    def run() -> None:
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    return run


def our_way(tokenizer, template, data: Path, folder: Path) -> Callable[[], None]:
    def run() -> None:
        shutil.rmtree(folder / 'cache', ignore_errors=True)
        prepare(tokenizer, template, data, folder)

    return run


def warm_way(tokenizer, template, data: Path, folder: Path) -> Callable[[], None]:
    def run() -> None:
        prepare(tokenizer, template, data, folder)[0]

    return run


def prepare(tokenizer, template, data: Path, folder: Path):
    from xtuner.config.schema import DatasetConfig
    from xtuner.dataset.prepare import prepare_dataset

    config = DatasetConfig(source=str(data), max_length=MAX_LENGTH, cache_dir=str(folder / 'cache'))
    return prepare_dataset(config, tokenizer=tokenizer, template=template)


def classic_way(model: Path, data: Path, folder: Path) -> Callable[[], None]:
    """What toolkits of this kind used to do: a Python tokenizer called for each text, and each stage a `map`."""
    from datasets import load_dataset

    tokenizer = slow_tokenizer(model / 'tokenizer.model')
    stages = classic_stages(tokenizer)

    def run() -> None:
        rows = load_dataset('json', data_files=str(data), split='train', cache_dir=str(folder / 'classic'))
        rows = rows.map(stages['convert'], remove_columns=rows.column_names)
        rows = rows.map(stages['template']).filter(lambda row: len(row['conversation']) > 0)
        rows = rows.map(stages['encode'], remove_columns=['conversation'])
        rows = rows.filter(lambda row: any(label >= 0 for label in row['labels']))
        rows = rows.shuffle(seed=0).flatten_indices()
        rows.map(stages['pack'], batched=True, remove_columns=rows.column_names)

    return run


def classic_stages(tokenizer) -> dict[str, Callable]:
    def convert(row):
        return {'conversation': [{'input': row['question'], 'output': row['answer']}]}

    def template(row):
        [turn] = row['conversation']
        return {
            'conversation': [{'input': f'<|User|>:{turn["input"]}<eoh>\n<|Bot|>:', 'output': turn['output'] + '<eoa>'}]
        }

    def encode(row):
        ids, labels = [tokenizer.bos_token_id], [-100]
        for turn in row['conversation']:
            asked = tokenizer.encode(turn['input'], add_special_tokens=False)
            answered = tokenizer.encode(turn['output'], add_special_tokens=False)
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        return {'input_ids': ids, 'labels': labels}

    def pack(batch):
        joined = {name: list(chain.from_iterable(batch[name])) for name in ('input_ids', 'labels')}
        size = len(joined['input_ids']) // MAX_LENGTH * MAX_LENGTH
        return {name: [ids[i : i + MAX_LENGTH] for i in range(0, size, MAX_LENGTH)] for name, ids in joined.items()}

    return {'convert': convert, 'template': template, 'encode': encode, 'pack': pack}


def slow_tokenizer(model_file: Path):
    """A tokenizer in Python around sentencepiece, as InternLM's own was."""
    import sentencepiece
    from transformers import PythonBackend

    class Slow(PythonBackend):
        def __init__(self, **kwargs) -> None:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
            super().__init__(bos_token='<s>', eos_token='</s>', unk_token='<unk>', **kwargs)

        @property
        def vocab_size(self) -> int:
            return self.model.get_piece_size()

        def get_vocab(self) -> dict[str, int]:
            return {self.model.id_to_piece(i): i for i in range(self.vocab_size)}

        def _tokenize(self, text: str, **kwargs) -> list[str]:
            return self.model.encode(text, out_type=str)

        def _convert_token_to_id(self, token: str) -> int:
            return self.model.piece_to_id(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self.model.id_to_piece(index)

    return Slow()


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    from xtuner.dataset.templates.builtin import get_template
    from xtuner.model.loading import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare(tokenizer, get_template('internlm_chat', tokenizer), args.data, Path(folder))
    return {'before': before / 1024, 'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def report_memory(args: argparse.Namespace) -> None:
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        content = args.data.read_bytes()
        for times in (1, 10):
            data = Path(folder) / f'{times}.jsonl'
            data.write_bytes(content * times)
            command = [sys.executable, __file__, str(args.model), str(data), '--once']
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(json.loads(out.splitlines()[-1])['peak'])
            print(f'memory   {times:2} x the data: peak {peaks[-1]:.0f} MiB')
    print(f'10 x / 1 x {peaks[1] / peaks[0]:.2f}')


if __name__ == '__main__':
    main()
