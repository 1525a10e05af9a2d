"""Reduces the size of tokenizer files, which are written with every checkpoint."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path


def shrink_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` without white space and with each merge as one string, and removes `tokenizer.model`.

    The loaded tokenizer is unchanged. InternLM's files shrink from 13 MB to 4.2 MB; `merge` takes `tokenizer.model`
    from the base.
    """
    path = folder / 'tokenizer.json'
    if not path.is_file():
        return
    path.write_text(_compact(path.read_text(encoding='utf-8')), encoding='utf-8')
    (folder / 'tokenizer.model').unlink(missing_ok=True)


@lru_cache(maxsize=1)  # takes a second for InternLM's, and is equal in all checkpoints of a run
def _compact(text: str) -> str:
    content = json.loads(text)
    model = content.get('model') or {}
    merges = model.get('merges') or []
    if all(isinstance(merge, list) and not any(' ' in piece for piece in merge) for merge in merges):
        model['merges'] = [' '.join(merge) for merge in merges]
    return json.dumps(content, ensure_ascii=False, separators=(',', ':'))
