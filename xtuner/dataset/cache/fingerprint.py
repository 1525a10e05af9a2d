"""Hashes of what prepared data depends on: the same hash means the same tokens."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(parts: Iterable[Any]) -> str:
    """Returns a hash, of 32 hexadecimal digits, of the representations of `parts`."""
    return hashlib.blake2b('\0'.join(map(repr, parts)).encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


@functools.lru_cache(maxsize=1)
def fingerprint_code() -> str:
    """Returns a hash of this room's own source: data prepared by other code is not taken for ours."""
    files = sorted(Path(__file__).parent.rglob('*.py'))
    return digest([(file.name, file.read_bytes()) for file in files])


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Returns a hash of everything a tokenizer does with a text.

    Of a fast one, the whole backend counts (vocabulary, merges, normaliser, pre-tokeniser, post-processor, added
    tokens), whichever files it was made from; of another, its vocabulary and the content of its files.
    """
    names = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    added = sorted((id_, repr(token)) for id_, token in tokenizer.added_tokens_decoder.items())
    if getattr(tokenizer, 'is_fast', False):
        # Truncation and padding stand first: left behind by whoever called it last, and switched off for encoding.
        head, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
        return digest([content or head, added, names])
    fields = sorted(getattr(tokenizer, 'vocab_files_names', ()))
    files = [Path(str(getattr(tokenizer, field, None) or '')) for field in fields]
    contents = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), contents, added, names])
