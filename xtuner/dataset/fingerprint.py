"""Hashes of what prepared data depends on: the same hash means the same tokens."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xtuner import __version__


def digest(parts: Iterable[Any]) -> str:
    """Returns a hash, of 32 hexadecimal digits, of the representations of `parts`."""
    return hashlib.blake2b('\0'.join(map(repr, parts)).encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


@functools.lru_cache(maxsize=1)
def fingerprint_code() -> str:
    """Returns a hash of this room's own source: data prepared by other code is not taken for ours."""
    files = sorted(Path(__file__).parent.rglob('*.py'))
    return digest([(file.name, file.read_bytes()) for file in files])


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Returns a hash of everything a tokenizer does with a text."""
    names = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    added = sorted((id_, repr(token)) for id_, token in tokenizer.added_tokens_decoder.items())
    if getattr(tokenizer, 'is_fast', False):
        backend, file = tokenizer.backend_tokenizer, Path(getattr(tokenizer, 'vocab_file', None) or '')
        if not file.is_file():
            return digest([backend.to_str(), names])
        # A tenth of a second of serialising is spared: the file that the pieces came from, what converted it, and
        # everything that may have been changed since say the same.
        steps = [repr(getattr(backend, step)) for step in ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')]
        content = hashlib.blake2b(file.read_bytes()).hexdigest()
        return digest([type(tokenizer).__name__, __version__, content, steps, added, names])
    return digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added, names])


def fingerprint_function(function: Callable[..., Any]) -> str:
    """Returns a hash of a function: its module's source, so that its helpers count, and what it was bound to."""
    if isinstance(function, functools.partial):
        return digest([fingerprint_function(function.func), function.args, sorted(function.keywords.items())])
    code = getattr(function, '__code__', None)
    if code is None:  # an object with `__call__`
        return digest(
            [_source(type(function)), type(function).__qualname__, sorted(getattr(function, '__dict__', {}).items())]
        )
    closure = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    source = _source(function) or (
        code.co_code,
        code.co_names,
        [c for c in code.co_consts if not hasattr(c, 'co_code')],
    )
    return digest([function.__qualname__, source, function.__defaults__, closure])


def _source(function: Any) -> str:
    module = sys.modules.get(function.__module__)
    file = getattr(module, '__file__', None)
    if file and Path(file).is_file():
        return Path(file).read_text(encoding='utf-8')
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ''
