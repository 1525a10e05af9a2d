"""arXiv: `abstract` and `title`; the model predicts the title."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, no_longer
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('abstract', 'title', detect=no_longer)
def arxiv_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The abstract is the question; the title is trained."""
    return one_turn(example, example['abstract'], example['title'], system=SYSTEM_TEMPLATE['arxiv_gentile'])
