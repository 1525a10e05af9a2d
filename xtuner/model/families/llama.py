"""Llama 1 to 3, and whatever else says `model_type: llama`."""

from __future__ import annotations

from xtuner.model.families.spec import ModelSpec

SPEC = ModelSpec(name='llama', model_types=frozenset({'llama'}))
