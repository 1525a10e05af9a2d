"""WizardLM: `conversations` as in ShareGPT."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.sharegpt import sharegpt_map_fn


@map_fn('conversations', detect=never)
def wizardlm_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Reads the record as ShareGPT."""
    return sharegpt_map_fn(example)
