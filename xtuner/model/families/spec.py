"""`ModelSpec`: what is particular to a family of models, as data. Each family has one; `families.find` looks them up.

Training, decoding, serving, memory prediction and export read a model through its spec. A spec describes classes of
modules, not names in configs alone: where a model is built of other classes, it gets the generic spec, which is always
right and never on the fused path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from xtuner.model.logits import LogitRule, logit_rule


@dataclass(frozen=True)
class LayerPaths:
    """Where a decoder layer keeps its submodules: dotted paths from the layer.

    Attributes:
        norms: The RMS norms before attention and before the MLP.
        attention: The attention module, which has `head_dim` and `scaling`.
        qkv: The projections to queries, keys and values, in this order; or one that holds all three.
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
        """The projections that read the same input, in the order of the forward pass: qkv, out, gate and up, down."""
        return self.qkv, (self.out,), self.gate_up, (self.down,)

    def projections(self, layer: Any) -> list[Any]:
        """A layer's projections, in the order of `groups`."""
        return [attrgetter(path)(layer) for group in self.groups for path in group]


LLAMA_PATHS = LayerPaths()


def attention_window(config: Any) -> int | None:
    """The window of a config's sliding-window layers, in tokens; None where every layer sees the whole sample."""
    window = getattr(config, 'sliding_window', None)
    layers = getattr(config, 'layer_types', None)
    slides = 'sliding_attention' in layers if layers else getattr(config, 'use_sliding_window', True)
    return window if window and slides else None


@dataclass(frozen=True)
class ModelSpec:
    """A family of models. The fields' defaults are Llama's.

    Attributes:
        name: The family, for messages.
        model_types: `model_type` in `config.json`, of the language model in a composite one. Empty: the generic spec.
        layers: The classes of decoder layer and attention that the spec describes, by name: a subclass may compute
            something else.
        paths: Submodules of a decoder layer; None: not described, so no fused path.
        decoder: Attributes of the decoder: its input embedding, layers, last norm and rotary embedding.
        activation_field: The field of the config that names the MLP's activation; only SiLU is fused.
        embedding: Name of the input embedding's weight in a checkpoint.
        head: Name of the output head's weight in a checkpoint.
        qkv_by_key_head: Whether the one qkv projection's rows are grouped by key head: its query heads, the key head,
            the value head.
        isolates_packs: Whether position ids alone keep the samples of a pack apart; None: measured when a model loads.
        module_names_on_disk: Whether published checkpoints name tensors after the modules, so that names and shapes can
            be checked before loading.
        logits: From a config to what the model does to its head's logits.
        llama_fields: From a config to the fields that differ in the `LlamaConfig` of the same model; None: the family
            has no Llama layout. It raises `ModelError` where one model has none.
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
        """Why a config keeps a model off the fused paths, in a few words; None where it does not."""
        activation = getattr(config, self.activation_field)
        if activation not in ('silu', 'swish'):
            return f'its activation is {activation}, not silu'
        if window := attention_window(config):
            return f'its attention has a window of {window} tokens'
        return None

    def mismatch(self, decoder: Any) -> str | None:
        """Why a decoder is not built as this spec says, in a few words; None where it is.

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
