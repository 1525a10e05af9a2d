"""InternLM v1: Llama with attention biases and optional dynamic NTK.

Parameter names are Llama's, so published checkpoints load unchanged.

Shape letters: B rows, H heads, S new tokens, L tokens in the cache including new ones, D head size.
"""

# transformers types its modules for internal use; mypy's findings on overridden methods can be ignored.
# mypy: disable-error-code="override, misc, assignment, arg-type, type-arg, operator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward, rotate_half

from xtuner.model.families.chat_api import ChatMixin
from xtuner.model.families.internlm.configuration import InternLMConfig
from xtuner.model.families.internlm.rotary import DynamicNTKRotaryEmbedding


class InternLMDynamicAttention(LlamaAttention):
    """Attention whose KV cache holds keys before rotation.

    The RoPE base depends on the length of the text, which grows during generation; so all keys are rotated with the
    current base in every step. A cache too short to exceed the trained length (`rotated`) holds rotated keys, as in
    Llama.
    """

    def __init__(self, config: InternLMConfig, layer_idx: int, rotary: DynamicNTKRotaryEmbedding) -> None:
        super().__init__(config, layer_idx)
        self._rotary = [rotary]  # in a list, so that it is not registered as a submodule

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Same as Llama's, except for the keys if there is a cache."""
        if past_key_values is None or getattr(past_key_values, 'rotated', False):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, position_ids=position_ids, **kwargs
            )
        assert position_ids is not None and position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_BHSD, key_BHSD, value_BHSD = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Before the update, since a static cache counts in place.
        last_slot = past_key_values.get_seq_length(self.layer_idx) + hidden_states.shape[1] - 1
        key_BHLD, value_BHLD = past_key_values.update(key_BHSD, value_BHSD, self.layer_idx)
        query_BHSD = _rotate(query_BHSD, *position_embeddings)
        key_BHLD = _rotate(key_BHLD, *self._at_all_keys(key_BHLD, position_ids, last_slot))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query_BHSD, key_BHLD, value_BHLD, attention_mask,
            position_ids=position_ids, dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
            **kwargs,
        )  # fmt: skip
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _at_all_keys(self, key_BHLD: Tensor, position_ids: Tensor, last_slot: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines for every key: its position is that of the last query minus its distance from it.

        In a left-padded row, positions therefore count from its first token; padding, which no query attends to, gets
        positions below 0.
        """
        slots = torch.arange(key_BHLD.shape[2], device=key_BHLD.device)
        positions_BL = slots[None, :] - last_slot + position_ids[:, -1:].to(key_BHLD.device)
        return self._rotary[0].at_length(key_BHLD, positions_BL, position_ids.max() + 1)


def _rotate(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    return x_BHSD * cos_BSD.unsqueeze(1) + rotate_half(x_BHSD) * sin_BSD.unsqueeze(1)


class InternLMModel(LlamaModel):
    """The decoder."""

    config_class = InternLMConfig

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        if config.ntk_factor is not None:
            self.rotary_emb = DynamicNTKRotaryEmbedding(config, config.ntk_factor)
            for index, layer in enumerate(self.layers):
                layer.self_attn = InternLMDynamicAttention(config, index, self.rotary_emb)
            self.post_init()


class InternLMForCausalLM(ChatMixin, LlamaForCausalLM):
    """The language model with `chat` and `stream_chat`, as on the model card."""

    config_class = InternLMConfig
    chat_template_name = 'internlm_chat'

    def __init__(self, config: InternLMConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = InternLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
