"""arXiv: `abstract` and `title`; the title is to be found."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE


@map_fn('abstract', 'title')
def arxiv_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The abstract is given, the title is trained."""
    return {
        'conversation': [
            {'system': SYSTEM_TEMPLATE['arxiv_gentile'], 'input': example['abstract'], 'output': example['title']}
        ]
    }
