"""The projections of a decoder's layers: what each is made of now, and what keeps them off the fused path."""

from __future__ import annotations

from typing import Any

from torch import nn

from xtuner.fused.frozen import LoraWeights
from xtuner.kernels.quantized import is_4bit
from xtuner.model.families.find import spec_of


def static_unsupported_reason(decoder: Any) -> str | None:
    """Why a decoder can never take the fused path, in a few words; None where it can."""
    config: Any = getattr(decoder, 'config', None)
    spec = spec_of(config)
    if reason := spec.mismatch(decoder):
        return reason
    assert spec.paths is not None
    if reason := spec.config_reason(config):
        return reason
    if config.attention_dropout:
        return 'it drops attention weights (attention_dropout > 0)'
    if any(p.requires_grad for n, p in decoder.named_parameters() if 'norm' in n.rsplit('.', 2)[-2]):
        return 'its norms are trained'
    for layer in decoder.layers:
        for projection in spec.paths.projections(layer):
            base = base_of(projection)
            if type(base) is not nn.Linear and not is_4bit(base):
                return f'a projection is a {type(base).__name__}, not Linear or Linear4bit'
            if any(p.requires_grad for p in base.parameters()):
                return 'a projection of the base model is trained itself'
    return None


def adapter_unsupported_reason(projection: Any) -> str | None:
    """Why one projection's adapter cannot take the fused path now; None where it can."""
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
        return 'the adapter has another form than plain LoRA' if _other_form(projection, name) else None
    if name in projection.lora_variant:
        return 'the adapter is a variant of LoRA (DoRA or the like)'
    down, up = projection.lora_A[name], projection.lora_B[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None or down.bias is not None:
        return 'the adapter has a bias or layers of its own'
    if not isinstance(projection.lora_dropout[name], nn.Dropout | nn.Identity):
        return 'the adapter has a dropout of its own'
    return None


def adapter_of(projection: Any) -> LoraWeights | None:
    """A projection's adapter as it is now, None where there is none or it is switched off."""
    if not hasattr(projection, 'lora_A') or projection.disable_adapters or not projection.active_adapters:
        return None
    name = projection.active_adapters[0]
    if name not in projection.lora_A:
        return None
    drop = projection.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return LoraWeights(projection.lora_A[name].weight, projection.lora_B[name].weight, projection.scaling[name], p)


def base_of(projection: Any) -> nn.Module:
    """The base model's own layer behind a peft layer."""
    return projection.get_base_layer() if hasattr(projection, 'get_base_layer') else projection


def _other_form(projection: Any, name: str | None) -> bool:
    return name in getattr(projection, 'lora_embedding_A', {})
