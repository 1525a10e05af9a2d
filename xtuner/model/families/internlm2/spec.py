"""InternLM2 and 2.5: Llama with one fused qkv projection, grouped by key head (see `modeling`)."""

from __future__ import annotations

from xtuner.model.families.spec import LayerPaths, ModelSpec

SPEC = ModelSpec(
    name='internlm2',
    model_types=frozenset({'internlm2'}),
    layers=frozenset({('InternLM2DecoderLayer', 'InternLM2Attention')}),
    paths=LayerPaths(
        norms=('attention_norm', 'ffn_norm'),
        attention='attention',
        qkv=('attention.wqkv',),
        out='attention.wo',
        gate_up=('feed_forward.w1', 'feed_forward.w3'),
        down='feed_forward.w2',
    ),
    embedding='model.tok_embeddings.weight',
    head='output.weight',
    qkv_by_key_head=True,
    llama_fields=lambda config: {},
)
