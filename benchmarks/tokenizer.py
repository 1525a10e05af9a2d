"""Tokens a second: our tokenizer beside the original's way (one text at a time, pieces, then ids), in one run.

    python benchmarks/tokenizer.py TOKENIZER_FOLDER TEXTS.jsonl

The original Python tokenizer splits each text at its special tokens, asks sentencepiece for pieces as strings, and
looks up the id of each; `Slow` does the same with transformers' own Python base class, as the original did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from transformers import PythonBackend

from xtuner.model.loading import load_tokenizer


class Slow(PythonBackend):
    """The original's steps on transformers' Python base class."""

    def __init__(self, file: str) -> None:
        self.sp = spm.SentencePieceProcessor(file)
        super().__init__(bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>')

    @property
    def vocab_size(self) -> int:
        """Pieces in the model."""
        return self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(index)


def texts(file: Path) -> list[str]:
    """The strings of each record, joined."""
    with file.open(encoding='utf-8') as lines:
        return ['\n'.join(v for v in json.loads(line).values() if isinstance(v, str)) for line in lines]


def measure(encode: Callable[[list[str]], list[list[int]]], found: list[str], num_rounds: int) -> tuple[float, int]:
    """Median tokens a second, and how many tokens there are."""
    rates, num_tokens = [], 0
    for _ in range(num_rounds):
        started = time.perf_counter()
        num_tokens = sum(map(len, encode(found)))
        rates.append(num_tokens / (time.perf_counter() - started))
    return statistics.median(rates), num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tokenizer', type=Path, help='a folder with tokenizer.model')
    parser.add_argument('texts', type=Path, help='a .jsonl file; the strings of a record are one text')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    found = texts(args.texts)
    ours, slow = load_tokenizer(args.tokenizer), Slow(str(args.tokenizer / 'tokenizer.model'))
    ways: dict[str, Callable[[list[str]], list[list[int]]]] = {
        'original': lambda batch: [slow.encode(text, add_special_tokens=False) for text in batch],
        'ours, as the data pipeline calls it': lambda batch: [
            e.ids for e in ours.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ],
        'ours, tokenizer(texts)': lambda batch: ours(batch, add_special_tokens=False).input_ids,
    }
    assert ways['original'](found[:200]) == ways['ours, tokenizer(texts)'](found[:200])
    base = 0.0
    for name, encode in ways.items():
        rate, num_tokens = measure(encode, found, args.rounds)
        base = base or rate
        print(f'{name:38} {rate / 1e6:6.2f} M tokens/s  {rate / base:5.2f} x  ({num_tokens} tokens)')


if __name__ == '__main__':
    main()
