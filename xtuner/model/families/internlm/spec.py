"""InternLM: Llama with biases on the attention's projections and dynamic NTK."""

from __future__ import annotations

import logging
from typing import Any

from xtuner.model.families.spec import ModelSpec

logger = logging.getLogger('xtuner')


def llama_fields(config: Any) -> dict[str, Any]:
    """The rotary parameters of dynamic NTK as Llama's config has them, with a warning about long texts."""
    if config.ntk_factor is None:
        return {}
    logger.warning(
        'this model stretches its positions beyond %d tokens (dynamic NTK, factor %g). Other tools keep keys as '
        'they were rotated, so answers beyond that length differ a little from the original',
        config.max_position_embeddings, config.ntk_factor,
    )  # fmt: skip
    theta = config.rope_parameters['rope_theta']
    return {'rope_parameters': {'rope_type': 'dynamic', 'factor': config.ntk_factor, 'rope_theta': theta}}


SPEC = ModelSpec(
    name='internlm',
    model_types=frozenset({'internlm'}),
    layers=frozenset({('LlamaDecoderLayer', 'LlamaAttention'), ('LlamaDecoderLayer', 'InternLMDynamicAttention')}),
    llama_fields=llama_fields,
)
