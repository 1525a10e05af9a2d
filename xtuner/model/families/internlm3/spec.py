"""InternLM3: Llama with head sizes of its own and two switches for biases."""

from __future__ import annotations

from typing import Any

from xtuner.errors import ModelError
from xtuner.model.families.spec import ModelSpec


def llama_fields(config: Any) -> dict[str, Any]:
    """No field differs.

    Raises:
        ModelError: biases on q, k and v but not on o, or the other way round, which Llama does not support.
    """
    if config.bias != config.qkv_bias:
        raise ModelError('its projections q, k and v have biases and o has none, or the other way round '
                         '(`qkv_bias`, `bias`), which Llama does not support')  # fmt: skip
    return {}


SPEC = ModelSpec(name='internlm3', model_types=frozenset({'internlm3'}), llama_fields=llama_fields)
