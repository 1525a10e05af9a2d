"""Hashes of what prepared data depends on: equal hashes mean equal tokens."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(parts: Iterable[Any]) -> str:
    """Returns a hash of the `repr` of each of `parts`, 32 hexadecimal digits."""
    return hashlib.blake2b('\0'.join(map(repr, parts)).encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


@functools.lru_cache(maxsize=1)
def fingerprint_code() -> str:
    """Returns a hash of the dataset package's source, so that data prepared by other code is not reused."""
    files = sorted(Path(__file__).parents[1].rglob('*.py'))
    return digest([(file.name, file.read_bytes()) for file in files])


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Returns a hash of everything that determines how a tokenizer encodes text.

    For a fast tokenizer that is the whole backend (vocabulary, merges, normalizer, pre-tokenizer, post-processor,
    added tokens), whichever files it was built from; for a slow one, its vocabulary and the content of its files.
    """
    names = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    added = sorted((id_, repr(token)) for id_, token in tokenizer.added_tokens_decoder.items())
    if getattr(tokenizer, 'is_fast', False):
        # Truncation and padding come first in the JSON: set by the last caller and switched off for encoding.
        head, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
        return digest([content or head, added, names])
    fields = sorted(getattr(tokenizer, 'vocab_files_names', ()))
    files = [Path(str(getattr(tokenizer, field, None) or '')) for field in fields]
    contents = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), contents, added, names])
