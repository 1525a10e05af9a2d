"""InternLM: Llama with biases on the attention projections and dynamic NTK."""

from __future__ import annotations

import logging
from typing import Any

from xtuner.model.families.spec import ModelSpec

logger = logging.getLogger('xtuner')


def llama_fields(config: Any) -> dict[str, Any]:
    """The RoPE parameters of dynamic NTK in Llama's config; warns about long texts."""
    if config.ntk_factor is None:
        return {}
    logger.warning(
        'this model uses dynamic NTK (factor %g) beyond %d tokens. Other tools do not rotate cached keys again, so '
        'that answers beyond that length differ slightly from the original',
        config.ntk_factor, config.max_position_embeddings,
    )  # fmt: skip
    theta = config.rope_parameters['rope_theta']
    return {'rope_parameters': {'rope_type': 'dynamic', 'factor': config.ntk_factor, 'rope_theta': theta}}


SPEC = ModelSpec(
    name='internlm',
    model_types=frozenset({'internlm'}),
    layers=frozenset({('LlamaDecoderLayer', 'LlamaAttention'), ('LlamaDecoderLayer', 'InternLMDynamicAttention')}),
    llama_fields=llama_fields,
)
