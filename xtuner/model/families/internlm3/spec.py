"""InternLM3: Llama with a separate head size and two switches for biases."""

from __future__ import annotations

from typing import Any

from xtuner.errors import ModelError
from xtuner.model.families.spec import ModelSpec


def llama_fields(config: Any) -> dict[str, Any]:
    """No fields differ.

    Raises:
        ModelError: biases on q, k and v but not on o, or vice versa, which Llama does not support.
    """
    if config.bias != config.qkv_bias:
        raise ModelError('its q, k and v projections have biases and its o projection has none, or vice versa '
                         '(`qkv_bias`, `bias`), which the Llama architecture does not support')  # fmt: skip
    return {}


SPEC = ModelSpec(name='internlm3', model_types=frozenset({'internlm3'}), llama_fields=llama_fields)
