"""What a model is made of, counted without its weights: from `config.json` alone, on torch's meta device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xtuner.model.loading  # noqa: F401  (makes transformers know InternLM)
from xtuner.adapters.attach import attach_adapter
from xtuner.fused.context import LayerParts
from xtuner.fused.decoder import FusedDecoder
from xtuner.fused.projections import adapter_unsupported_reason, base_of, static_unsupported_reason
from xtuner.kernels.dispatch import PLAIN
from xtuner.model.check import build_on_meta
from xtuner.model.families.find import layers_of, spec_of
from xtuner.model.families.spec import LLAMA_PATHS, LayerPaths


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a base model and of what is trained on it.

    Attributes:
        hidden: H, width of the residual stream.
        inner: I, width of the MLP.
        num_layers: L.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: D.
        vocabulary: V.
        linear: (N, K) of each linear layer that quantisation applies to: all but the output head.
        num_embedding: Elements of the input embedding.
        num_head: Elements of the output head, 0 where it is the input embedding.
        num_other: Elements of the rest: norms, biases.
        num_trained: Trained elements, which are float32.
        ranks: The adapters' ranks on q, k, v, o, gate, up and down of a layer; 0 without one. Of a fused qkv
            projection under q. Where a layer without a spec names its projections otherwise, the largest rank for each.
        dropout: Whether adapters drop inputs.
        unsupported_reason: Why the fused path is not supported; '' if it is.
        kind: `model_type`.
        parts: A layer as the fused path sees it; None if it is not supported.
    """

    hidden: int
    inner: int
    num_layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    linear: tuple[tuple[int, int], ...]
    num_embedding: int
    num_head: int
    num_other: int
    num_trained: int
    ranks: tuple[int, ...]
    dropout: bool
    unsupported_reason: str
    kind: str
    parts: LayerParts | None = field(default=None, repr=False, compare=False)

    @property
    def num_linear(self) -> int:
        """Elements of all linear layers of the blocks."""
        return sum(n * k for n, k in self.linear)

    @property
    def num_base(self) -> int:
        """Elements of the base model."""
        return self.num_linear + self.num_embedding + self.num_head + self.num_other


def model_dims(config: Any, adapter: Mapping[str, Any] | None, *, trust_remote_code: bool = False) -> ModelDims:
    """Builds the model and its adapter without memory and counts.

    Args:
        config: A transformers config, such as `load_config` returns.
        adapter: The `adapter` section of a run's config; None: every weight is trained.
        trust_remote_code: Whether a model that transformers does not know may run its own code.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    path = Path(config.name_or_path) / 'config.json'
    model: Any = build_on_meta(config, path, trust_remote_code=trust_remote_code)
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        base = _count_base(model)
        if adapter is None:
            model.requires_grad_(True)
        else:
            model = attach_adapter(model, adapter)
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    decoder = causal.get_decoder()
    layers = layers_of(decoder)
    spec = spec_of(decoder.config)
    reason = static_unsupported_reason(decoder)
    if not reason and spec.paths:
        reason = next(filter(None, map(adapter_unsupported_reason, spec.paths.projections(layers[0]))), None)
    text = config.get_text_config()
    heads = getattr(text, 'num_attention_heads', None) or 1
    return ModelDims(
        hidden=text.hidden_size,
        inner=getattr(text, 'intermediate_size', None) or 4 * text.hidden_size,
        num_layers=len(layers),
        heads=heads,
        kv_heads=getattr(text, 'num_key_value_heads', None) or heads,
        head_size=getattr(text, 'head_dim', None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        ranks=_ranks(layers[0], spec.paths or LLAMA_PATHS),
        dropout=any(isinstance(m, nn.Dropout) and m.p > 0 for n, m in model.named_modules() if 'lora_dropout' in n),
        unsupported_reason=reason or '',
        kind=config.model_type,
        parts=None if reason else FusedDecoder(decoder, PLAIN, fused_lora=True).layers[0],
        **base,
    )


def _count_base(model: Any) -> dict[str, Any]:
    """Elements by what becomes of them: quantised, looked up, multiplied at the end, left alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    tied = head is None or head.weight is embedding.weight
    total = sum(p.numel() for p in model.parameters())
    counts = {'num_embedding': embedding.weight.numel(), 'num_head': 0 if tied else head.weight.numel()}
    shapes = tuple((m.out_features, m.in_features) for m in linear)
    return {
        **counts,
        'linear': shapes,
        'num_other': total - sum(counts.values()) - sum(n * k for n, k in shapes),
    }


def _ranks(layer: nn.Module, paths: LayerPaths) -> tuple[int, ...]:
    """The ranks of the adapters on a layer's projections, in the order of `ModelDims.ranks`."""
    ranks = {name.rsplit('.', 1)[-1]: _rank(module) for name, module in layer.named_modules()}
    qkv, *others = ([ranks.get(path.rsplit('.', 1)[-1], 0) for path in group] for group in paths.groups)
    found = (*qkv, *[0] * (3 - len(qkv)), *(rank for group in others for rank in group))
    return found if any(found) else (max(ranks.values(), default=0),) * len(found)


def _rank(module: Any) -> int:
    """The rank of the adapter on a module, 0 where there is none."""
    return (
        0 if module is base_of(module) or not isinstance(getattr(module, 'r', None), dict) else max(module.r.values())
    )
