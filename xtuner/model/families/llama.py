"""Llama 1 to 3, and other models with `model_type: llama`."""

from __future__ import annotations

from xtuner.model.families.spec import ModelSpec

SPEC = ModelSpec(name='llama', model_types=frozenset({'llama'}))
