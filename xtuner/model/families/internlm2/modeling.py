"""InternLM2 and 2.5: Llama with q, k and v in one projection, under the names of the published checkpoints.

The rows of `wqkv` are grouped by key head: the G query heads that share it, then the key head, then the value head.

    wqkv rows, D at a time:   q q k v | q q k v | ...        for G = 2

The modules have the published names, so checkpoints, adapters and merged models work in every tool that supports
InternLM2.

Shape letters: B rows, S tokens, K key heads, G query heads per key head, D head size, C hidden size.
"""

# transformers types its modules for internal use; mypy's findings on overridden methods can be ignored.
# mypy: disable-error-code="override, misc, assignment, arg-type, type-arg, operator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from xtuner.model.families.chat_api import ChatMixin
from xtuner.model.families.internlm.rotary import DynamicNTKRotaryEmbedding
from xtuner.model.families.internlm2.configuration import InternLM2Config


def split_wqkv(wqkv: Tensor, num_key_heads: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the fused projection.

    Args:
        wqkv: (K * (G + 2) * D, ...), the weight or the bias of `wqkv`.
        num_key_heads: K.
        head_size: D.

    Returns:
        (K * G * D, ...), (K * D, ...), (K * D, ...): those of q, k and v in Llama's layout.
    """
    grouped = wqkv.reshape(num_key_heads, -1, head_size, *wqkv.shape[1:])
    parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    query, key, value = (part.reshape(-1, *wqkv.shape[1:]) for part in parts)
    return query, key, value


class InternLM2Attention(LlamaAttention):
    """Llama's attention with one fused qkv projection."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Same as Llama's: hidden states (B, S, C) to (B, S, C) and, if requested, attention weights."""
        assert position_embeddings is not None
        rows, length, _ = hidden_states.shape
        grouped = self.wqkv(hidden_states).view(rows, length, -1, self.num_key_value_groups + 2, self.head_dim)
        query = grouped[..., :-2, :].reshape(rows, length, -1, self.head_dim).transpose(1, 2)
        key, value = grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.wo(output.reshape(rows, length, -1).contiguous()), weights


class InternLM2MLP(nn.Module):
    """Llama's gated MLP: w1 is the gate projection, w3 the up projection, w2 the down projection."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) to (B, S, C)."""
        return self.w2(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states))


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, C) to (B, S, C); keyword arguments are passed to attention."""
        attended, _ = self.attention(hidden_states=self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2Model(LlamaModel):
    """The decoder: Llama's forward pass over InternLM2's modules. Also the backbone of the reward models."""

    config_class = InternLM2Config
    _no_split_modules: ClassVar[list[str]] = ['InternLM2DecoderLayer']
    _can_record_outputs: ClassVar[dict[str, type]] = {
        'hidden_states': InternLM2DecoderLayer,
        'attentions': InternLM2Attention,
    }
    # A reward model is this backbone with a head of one output.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r'^v_head\.', r'^output\.']

    def __init__(self, config: InternLM2Config) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        factor = config.ntk_factor
        self.rotary_emb = LlamaRotaryEmbedding(config) if factor is None else DynamicNTKRotaryEmbedding(config, factor)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:
        """The embedding, under the name that Llama's forward pass uses."""
        return self.tok_embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.tok_embeddings = value


class InternLM2ForCausalLM(ChatMixin, LlamaForCausalLM):
    """The language model with `chat` and `stream_chat`, as on the model card."""

    config_class = InternLM2Config
    chat_template_name = 'internlm2_chat'
    _no_split_modules: ClassVar[list[str]] = ['InternLM2DecoderLayer']
    _tied_weights_keys: ClassVar[dict[str, str]] = {'output.weight': 'model.tok_embeddings.weight'}
    _tp_plan: ClassVar[dict[str, str]] = {}
    _pp_plan: ClassVar[dict[str, Any]] = {}
    _can_record_outputs = InternLM2Model._can_record_outputs

    def __init__(self, config: InternLM2Config) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def lm_head(self) -> nn.Module:
        """The output projection, under the name that Llama's forward pass uses."""
        return self.output

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output projection."""
        self.output = value
