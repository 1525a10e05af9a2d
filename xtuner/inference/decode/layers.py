"""Describes a Llama-like decoder for decoding: its groups of linear layers and heads; and why others are unsupported.

Shape letters: T tokens, K key heads, G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.fused.projections import adapter_unsupported_reason, base_of
from xtuner.inference.decode.product import Product
from xtuner.kernels.quantized import is_4bit
from xtuner.model.families.find import spec_of
from xtuner.model.families.spec import LayerPaths, ModelSpec

_LENGTH_BOUND = ('DynamicNTKRotaryEmbedding',)  # angles depend on the length of the text beyond the trained length


@dataclass(frozen=True)
class Heads:
    """Layout of the heads in the output of the q, k and v projections.

    `groups` groups, each of `queries` query heads, `keys` key heads and `keys` value heads: Llama has one group of all
    heads, InternLM2 one group per key head.
    """

    groups: int
    queries: int
    keys: int
    size: int
    scale: float

    @property
    def num_queries(self) -> int:
        """Number of query heads."""
        return self.groups * self.queries

    @property
    def num_keys(self) -> int:
        """Number of key heads."""
        return self.groups * self.keys


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    norm_in: Any
    norm_mid: Any
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    heads: Heads

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """The products, in the order of the forward pass."""
        return self.qkv, self.out, self.gate_up, self.down


def read_layers(decoder: Any) -> list[Layer]:
    """Describes the layers of a decoder that has no `unsupported_reason`; the decoder is not changed."""
    spec = spec_of(decoder.config)
    return [_read_layer(layer, decoder.config, spec) for layer in decoder.layers]


def _read_layer(layer: Any, config: Any, spec: ModelSpec) -> Layer:
    assert spec.paths is not None
    norm_in, norm_mid = (attrgetter(path)(layer) for path in spec.paths.norms)
    dtype = norm_in.weight.dtype
    qkv, out, gate_up, down = (
        Product([attrgetter(path)(layer) for path in group], dtype) for group in spec.paths.groups
    )
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    attention = attrgetter(spec.paths.attention)(layer)
    split = keys if spec.qkv_by_key_head else 1
    heads = Heads(split, queries // split, keys // split, attention.head_dim, attention.scaling)
    return Layer(norm_in, norm_mid, qkv, out, gate_up, down, heads)


def unsupported_reason(causal: Any) -> str | None:
    """Why the architecture of a model is unsupported, in a few words; None if it is supported.

    Args:
        causal: A causal language model, not wrapped by peft.
    """
    decoder = causal.get_decoder() if hasattr(causal, 'get_decoder') else None
    if decoder is None:
        return f'{type(causal).__name__} has no decoder'
    spec = spec_of(causal.config)
    if reason := spec.mismatch(decoder):
        return reason
    assert spec.paths is not None
    if getattr(decoder.rotary_emb, 'rope_type', 'default') == 'longrope':
        return 'its RoPE depends on the length of the text (longrope)'
    for layer in decoder.layers:
        if reason := _layer_unsupported_reason(layer, spec.paths):
            return reason
    if reason := spec.config_reason(decoder.config):
        return reason
    devices = {parameter.device for parameter in causal.parameters()}
    if len(devices) > 1 or 'meta' in {device.type for device in devices}:
        return 'its weights are on several devices'
    return None


def max_tokens(decoder: Any) -> float:
    """Maximum length of a text in tokens before the RoPE base of a decoder changes; infinite if it never does."""
    kind = getattr(decoder.rotary_emb, 'rope_type', 'default')
    bound = type(decoder.rotary_emb).__name__ in _LENGTH_BOUND or kind == 'dynamic'
    return decoder.config.max_position_embeddings if bound else float('inf')


def _layer_unsupported_reason(layer: Any, paths: LayerPaths) -> str | None:
    if hasattr(layer, 'unshard'):
        return 'its weights are sharded over ranks'
    for projection in paths.projections(layer):
        base = base_of(projection)
        supported = (type(base) is nn.Linear and type(base.weight) is nn.Parameter) or is_4bit(base)
        if not supported:
            return f'a projection is a {type(base).__name__}, not Linear or Linear4bit'
        reason = None if getattr(projection, 'merged', False) else adapter_unsupported_reason(projection)
        if reason:
            return reason
    return None


def submodules(root: nn.Module) -> list[nn.Module]:
    """All submodules, fast: a 7B model with adapters has thousands, and they are listed before each answer."""
    found: list[nn.Module] = []
    stack = [root]
    while stack:
        children = [child for child in stack.pop()._modules.values() if child is not None]
        found += children
        stack += children
    return found


def weight_state(modules: Sequence[nn.Module]) -> tuple:
    """Changes when weights do: addresses and versions of all parameters.

    Some optimizers write to memory without incrementing the version, so one value of each trainable parameter is
    included.
    """
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    with (
        torch._C.DisableTorchFunctionSubclass()
    ):  # bitsandbytes' parameters would dispatch every attribute access to Python
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
        seen = [p.detach().reshape(-1)[p.numel() // 2].float() for p in parameters if p.requires_grad and p.numel()]
    return weights, tuple(torch.stack(seen).tolist()) if seen else ()


def adapter_state(modules: Sequence[nn.Module]) -> tuple:
    """The active and merged adapters, and their scalings."""
    tuned: list[Any] = [m for m in modules if 'merged_adapters' in m.__dict__ and 'scaling' in m.__dict__]
    return tuple(
        (m.disable_adapters, tuple(m.active_adapters), tuple(m.merged_adapters), tuple(m.scaling.values()))
        for m in tuned
    )


def rotary_table(decoder: Any, capacity: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to capacity - 1, float32 (capacity, D / 2); float64 for a float64 model."""
    weight = decoder.norm.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    positions = torch.arange(capacity, device=weight.device)[None]
    with torch.autocast(weight.device.type, enabled=False):
        cos, sin = decoder.rotary_emb(torch.empty(0, dtype=wide, device=weight.device), position_ids=positions)
    return cos[0, :, : size // 2].contiguous(), sin[0, :, : size // 2].contiguous()
