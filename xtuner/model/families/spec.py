"""`ModelSpec`: the properties of a model family, as data. Each family has one; `families.find` looks them up.

Training, decoding, serving, memory prediction and export read a model through its spec. A spec describes module
classes, not only names in configs: a model built from other classes does not match it and never takes the fused path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from xtuner.model.logits import LogitRule, logit_rule


@dataclass(frozen=True)
class LayerPaths:
    """The submodules of a decoder layer: dotted paths relative to the layer.

    Attributes:
        norms: The RMS norms before attention and before the MLP.
        attention: The attention module, with attributes `head_dim` and `scaling`.
        qkv: The projections to queries, keys and values, in this order; or one fused projection.
        out: The attention's output projection.
        gate_up: The MLP's gate and up projections.
        down: The MLP's down projection.
    """

    norms: tuple[str, str] = ('input_layernorm', 'post_attention_layernorm')
    attention: str = 'self_attn'
    qkv: tuple[str, ...] = ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')
    out: str = 'self_attn.o_proj'
    gate_up: tuple[str, str] = ('mlp.gate_proj', 'mlp.up_proj')
    down: str = 'mlp.down_proj'

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of projections that read the same input, in the order of the forward pass."""
        return self.qkv, (self.out,), self.gate_up, (self.down,)

    def projections(self, layer: Any) -> list[Any]:
        """A layer's projections, in the order of `groups`."""
        return [attrgetter(path)(layer) for group in self.groups for path in group]


LLAMA_PATHS = LayerPaths()


def attention_window(config: Any) -> int | None:
    """The attention window of sliding-window layers, in tokens; None if all layers attend to the whole sample."""
    window = getattr(config, 'sliding_window', None)
    layers = getattr(config, 'layer_types', None)
    slides = 'sliding_attention' in layers if layers else getattr(config, 'use_sliding_window', True)
    return window if window and slides else None


@dataclass(frozen=True)
class ModelSpec:
    """The spec of a model family. The defaults are Llama's.

    Attributes:
        name: Name of the family, for messages.
        model_types: Values of `model_type` in `config.json`, of the text config in a composite model. Empty: the
            generic spec.
        layers: Names of the supported classes of decoder layer and attention; subclasses may compute something else.
        paths: Submodules of a decoder layer; None: unknown, so the fused path is not supported.
        decoder: Attributes of the decoder: input embedding, layers, last norm and rotary embedding.
        activation_field: The config field with the MLP's activation; the fused path supports only SiLU.
        embedding: Name of the input embedding's weight in checkpoints.
        head: Name of the output head's weight in checkpoints.
        qkv_by_key_head: Whether the rows of the fused qkv projection are grouped by key head: its query heads, the key
            head, the value head.
        isolates_packs: Whether position ids are sufficient to isolate the samples of a pack; None: measured at load.
        module_names_on_disk: Whether tensors in published checkpoints are named after the modules, so that names and
            shapes can be checked before loading.
        logits: Returns the transformation of the logits (scale, cap) for a config.
        llama_fields: Returns the fields that differ in the `LlamaConfig` of the same model for a config, and raises
            `ModelError` if there is none; None: the family cannot be converted to Llama's layout.
    """

    name: str
    model_types: frozenset[str] = frozenset()
    layers: frozenset[tuple[str, str]] = frozenset({('LlamaDecoderLayer', 'LlamaAttention')})
    paths: LayerPaths | None = LLAMA_PATHS
    decoder: tuple[str, ...] = ('embed_tokens', 'layers', 'norm', 'rotary_emb')
    activation_field: str = 'hidden_act'
    embedding: str = 'model.embed_tokens.weight'
    head: str = 'lm_head.weight'
    qkv_by_key_head: bool = False
    isolates_packs: bool | None = True
    module_names_on_disk: bool = True
    logits: Callable[[Any], LogitRule] = field(default=logit_rule, repr=False)
    llama_fields: Callable[[Any], Mapping[str, Any]] | None = field(default=None, repr=False)

    def config_reason(self, config: Any) -> str | None:
        """Why a model with this config cannot take the fused path, in a few words; None if it can."""
        activation = getattr(config, self.activation_field)
        if activation not in ('silu', 'swish'):
            return f'its activation is {activation}, not silu'
        if window := attention_window(config):
            return f'its attention has a window of {window} tokens'
        return None

    def mismatch(self, decoder: Any) -> str | None:
        """Why a decoder does not match this spec, in a few words; None if it does.

        Args:
            decoder: The module that `get_decoder()` returns.
        """
        if self.paths is None:
            config = getattr(decoder, 'config', None)
            return f'no spec describes {getattr(config, "model_type", type(decoder).__name__)}'
        missing = [name for name in self.decoder if not hasattr(decoder, name)]
        if missing or not len(decoder.layers):
            return f'{type(decoder).__name__} has no {missing[0] if missing else "layers"}'
        attention = attrgetter(self.paths.attention)
        for layer in decoder.layers:
            kind = type(layer).__name__
            if kind not in {name for name, _ in self.layers}:
                return f'its layers are {kind}'
            if (kind, type(attention(layer)).__name__) not in self.layers:
                return f'its attention is {type(attention(layer)).__name__}'
        return None
