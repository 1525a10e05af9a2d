"""The projections of decoder layers: their base layers and adapters, and why they cannot take the fused path."""

from __future__ import annotations

from typing import Any

from torch import nn

from xtuner.fused.frozen import LoraWeights
from xtuner.kernels.quantized import is_4bit
from xtuner.model.families.find import spec_of


def static_unsupported_reason(decoder: Any) -> str | None:
    """Why a decoder can never take the fused path, in a few words; None if it can."""
    config: Any = getattr(decoder, 'config', None)
    spec = spec_of(config)
    if reason := spec.mismatch(decoder):
        return reason
    assert spec.paths is not None
    if reason := spec.config_reason(config):
        return reason
    if config.attention_dropout:
        return 'it uses attention dropout (attention_dropout > 0)'
    if any(p.requires_grad for n, p in decoder.named_parameters() if 'norm' in n.rsplit('.', 2)[-2]):
        return 'its norms are trainable'
    for layer in decoder.layers:
        for projection in spec.paths.projections(layer):
            base = base_of(projection)
            if type(base) is not nn.Linear and not is_4bit(base):
                return f'a projection is a {type(base).__name__}, not Linear or Linear4bit'
            if any(p.requires_grad for p in base.parameters()):
                return 'the weight of a base projection is trainable'
    return None


def adapter_unsupported_reason(projection: Any) -> str | None:
    """Why a projection's current adapter cannot take the fused path, in a few words; None if it can."""
    if not hasattr(projection, 'lora_A'):
        return None if projection is base_of(projection) else f'adapters of type {type(projection).__name__}'
    if projection.merged:
        return 'the adapter is merged'
    if projection.disable_adapters:
        return None
    active = projection.active_adapters
    if len(active) > 1:
        return f'{len(active)} adapters are active at once'
    name = active[0] if active else None
    if name not in projection.lora_A:
        return 'the adapter is not a LoRA of linear layers' if _adapts_embedding(projection, name) else None
    if name in projection.lora_variant:
        return 'the adapter is a variant of LoRA (such as DoRA)'
    down, up = projection.lora_A[name], projection.lora_B[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None or down.bias is not None:
        return 'the adapter has biases or custom layers'
    if not isinstance(projection.lora_dropout[name], nn.Dropout | nn.Identity):
        return 'the adapter has a custom dropout'
    return None


def adapter_of(projection: Any) -> LoraWeights | None:
    """A projection's current adapter; None if there is none or it is disabled."""
    if not hasattr(projection, 'lora_A') or projection.disable_adapters or not projection.active_adapters:
        return None
    name = projection.active_adapters[0]
    if name not in projection.lora_A:
        return None
    drop = projection.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return LoraWeights(projection.lora_A[name].weight, projection.lora_B[name].weight, projection.scaling[name], p)


def base_of(projection: Any) -> nn.Module:
    """The base layer wrapped by a peft layer; the layer itself if it is not wrapped."""
    return projection.get_base_layer() if hasattr(projection, 'get_base_layer') else projection


def _adapts_embedding(projection: Any, name: str | None) -> bool:
    return name in getattr(projection, 'lora_embedding_A', {})
