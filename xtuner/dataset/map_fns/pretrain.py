"""Plain documents: `text`, trained without a template."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn


@map_fn('text')
def pretrain_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The whole text is trained, between the tokenizer's BOS and EOS."""
    return {'conversation': [{'input': '', 'output': example['text']}], 'plain': True}
