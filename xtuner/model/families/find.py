"""Looks up the spec of a model. To add a family, add its module and list it in `SPECS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from xtuner.errors import ModelError
from xtuner.model.families import llama
from xtuner.model.families.internlm import spec as internlm
from xtuner.model.families.internlm2 import spec as internlm2
from xtuner.model.families.internlm3 import spec as internlm3
from xtuner.model.families.spec import ModelSpec

SPECS = (llama.SPEC, internlm.SPEC, internlm2.SPEC, internlm3.SPEC)
GENERIC = ModelSpec('generic', layers=frozenset(), paths=None, isolates_packs=None, module_names_on_disk=False)
"""Spec of models without one of their own: always their own forward pass; a probe measures the rest at load."""

_BY_TYPE = {kind: spec for spec in SPECS for kind in spec.model_types}


def spec_of(config: Any) -> ModelSpec:
    """The spec of a model.

    Args:
        config: A transformers config; for a composite model, its text config is used.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, 'get_text_config') else config
    return _BY_TYPE.get(getattr(text, 'model_type', ''), GENERIC)


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, whatever their name: its longest `ModuleList`.

    Raises:
        ModelError: the decoder has no `ModuleList`.
    """
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        kind = getattr(getattr(decoder, 'config', None), 'model_type', type(decoder).__name__)
        raise ModelError(f'a model of type {kind!r} has no list of decoder layers')
    return max(lists, key=len)
