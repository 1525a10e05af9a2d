"""The fast path of a training step, on a model as transformers and peft built it.

`enable_fused_training(model)` gives the decoder of this one model another forward pass for training; modules,
parameters, names and what is saved stay what they were. Whatever the fast path does not cover (generation, evaluation,
attention masks, caches, DoRA, several active adapters, merged ones) goes through the model's own forward pass.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.errors import ConfigError
from xtuner.fused.decoder import FusedDecoder, ShardedForward, fp8_unsupported_reason
from xtuner.fused.fp8 import device_unsupported_reason
from xtuner.fused.loss import fused_linear_cross_entropy, target_rows
from xtuner.fused.offload import free_bytes, move_embedding_to_host, wait_once_a_step
from xtuner.fused.projections import static_unsupported_reason
from xtuner.fused.ulysses import SequenceGroup
from xtuner.kernels.dispatch import PLAIN, fused_kernels, has_triton

__all__ = [
    'FusedTraining',
    'activation_budget',
    'enable_fused_training',
    'fused_linear_cross_entropy',
    'set_activation_budget',
    'target_rows',
    'wait_once_a_step',
]

_KEPT_SHARE = 0.25  # of the free memory, for 4-bit weights kept as floats on a CPU
_LOGGER = logging.getLogger('xtuner')


@dataclass
class FusedTraining:
    """Which path training takes.

    Attributes:
        taken: Whether the fast path is on.
        kernels: 'triton', 'plain', or '' where it is off.
        reason_disabled: Why it is off, or not faster; '' where nothing stands in the way.
        embedding_on_host: Whether the input embedding lies in host memory.
        fp8: Whether frozen weights and adapters are multiplied in FP8.
        fallbacks: Reasons for which single batches went through the model's own forward pass so far.

    """

    taken: bool
    kernels: str = ''
    reason_disabled: str = ''
    embedding_on_host: bool = False
    fp8: bool = False
    fallbacks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.taken:
            return f'fast path off: {self.reason_disabled}'
        detail = f' ({self.reason_disabled})' if self.reason_disabled else ''
        place = ', input embedding on the host' if self.embedding_on_host else ''
        products = ', products in FP8' if self.fp8 else ''
        return f'fast path on: {self.kernels} kernels{products}{place}{detail}'


class _Forward:
    """Stands in for one decoder's `forward`: the fast one in training, the module's own for the rest."""

    def __init__(self, fast: FusedDecoder, path: FusedTraining) -> None:
        self.fast = fast
        self.path = path

    def __call__(
        self, input_ids: Tensor | None = None, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        asked = args or any(v is not None and v is not False for k, v in kwargs.items() if k != 'return_dict')
        # A pack that is spread over ranks is validated that way, too.
        fast = self.fast.decoder.training or self.fast.sequence is not None
        if not fast or asked or input_ids is None:
            return self._own(input_ids, *args, position_ids=position_ids, **kwargs)
        reason = self.fast.unsupported_reason()
        if reason and self.fast.sequence is not None:
            raise ConfigError(f'`parallel.sequence_parallel_size` needs the fast path, and {reason}')
        if reason:
            if reason not in self.path.fallbacks:
                self.path.fallbacks.append(reason)
                _LOGGER.warning('this step takes the stock path: %s', reason)
            return self._own(input_ids, position_ids=position_ids, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.fast(input_ids, position_ids))

    def _own(self, input_ids: Tensor | None, *args: Any, position_ids: Tensor | None, **kwargs: Any) -> Any:
        decoder = self.fast.decoder
        if position_ids is not None:  # the fast path takes them from the host
            position_ids = position_ids.to(decoder.embed_tokens.weight.device)
        return type(decoder).forward(decoder, input_ids, *args, position_ids=position_ids, **kwargs)


def enable_fused_training(
    model: nn.Module,
    *,
    enabled: bool = True,
    embedding_on_host: bool = True,
    recompute_by_memory: bool = False,
    fp8: bool = False,
    sharded: bool = False,
) -> FusedTraining:
    """Lets a Llama-like model train on the fast path where it can.

    Args:
        model: A transformers causal language model, bare or wrapped by peft. Changed in place: its decoder's `forward`
            is replaced on the instance. Attach adapters first.
        enabled: False takes the fast path off again, if it was on.
        embedding_on_host: On CUDA, keep a frozen, untied input embedding in host memory, of which a batch needs a few
            rows; the GPU reads them over the bus.
        recompute_by_memory: Compute as few layers again as the free memory allows, in place of all or none as the
            model's own checkpointing setting says (which stays what the stock path goes by).
        fp8: Multiply frozen weights and adapters in FP8.
        sharded: Whether `fully_shard` will be put on the layers.

    Returns:
        What was done and why not more; `str()` of it is one line.

    Raises:
        ConfigError: `fp8` where products cannot be in FP8.

    Example:
        path = enable_fused_training(peft_model); print(path)  ->  fast path on: triton kernels

    """
    causal, decoder = _decoder_of(model)
    if isinstance(decoder.__dict__.get('forward'), _Forward):
        del decoder.forward
    reason = (static_unsupported_reason(decoder) or _hooks(decoder)) if enabled else 'switched off'
    if reason and fp8:
        raise ConfigError(f'`runtime.fp8` needs the fast path, which is off: {reason}')
    if reason:
        return FusedTraining(False, reason_disabled=reason)
    device = next(decoder.layers[0].parameters()).device
    on_cuda = device.type == 'cuda'
    kernels = fused_kernels() if on_cuda and has_triton() else PLAIN
    path = FusedTraining(True, kernels.name, fp8=fp8)
    fast = FusedDecoder(decoder, kernels, fused_lora=on_cuda, by_memory=recompute_by_memory, fp8=fp8, sharded=sharded)
    _refuse_fp8(fp8_unsupported_reason(fast) if fp8 else None)
    if device.type == 'cpu' and not sharded:
        path.reason_disabled = _keep_on_cpu(fast)
    elif on_cuda and kernels is PLAIN:
        path.reason_disabled = 'Triton is not installed, its kernels would be faster'
    if on_cuda and embedding_on_host and not _tied(causal, decoder):
        path.embedding_on_host = move_embedding_to_host(decoder.embed_tokens)
    decoder.forward = _Forward(fast, path)
    return path


def _decoder_of(model: nn.Module) -> tuple[Any, Any]:
    """The causal language model behind peft's wrapper, and its decoder."""
    outer: Any = model
    causal = outer.get_base_model() if hasattr(outer, 'get_base_model') else outer
    return causal, causal.get_decoder() if hasattr(causal, 'get_decoder') else causal


def reads_host_positions(decoder: Any) -> bool:
    """Whether a decoder takes position ids from the host, as the fast path does, to see where samples begin."""
    return isinstance(getattr(decoder, 'forward', None), _Forward)


def share_sequences(model: nn.Module, ranks: SequenceGroup) -> None:
    """Spreads each row of a training batch over ranks.

    Args:
        model: What `enable_fused_training` was called on.
        ranks: Who shares rows.

    Raises:
        ConfigError: the fast path is off, or heads cannot be shared out evenly.

    """
    decoder = _decoder_of(model)[1]
    forward = decoder.__dict__.get('forward')
    if not isinstance(forward, _Forward):
        raise ConfigError('`parallel.sequence_parallel_size` needs the fast path, which is off for this model')
    check_heads(decoder.config, ranks.size)
    forward.fast.sequence = ranks


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError where `runtime.fp8` can do nothing on a device, whatever the model is."""
    _refuse_fp8(device_unsupported_reason(device))


def _refuse_fp8(reason: str | None) -> None:
    if reason:
        raise ConfigError(f'`runtime.fp8`: {reason}; leave it out')


def check_heads(config: Any, size: int) -> None:
    """Raises ConfigError where a model's heads cannot be shared out evenly over `size` ranks."""
    if size == 1:
        return
    text = config.get_text_config(decoder=True)
    heads = getattr(text, 'num_key_value_heads', None) or getattr(text, 'num_attention_heads', None)
    if not isinstance(heads, int):
        raise ConfigError(
            f'`parallel.sequence_parallel_size` is {size}, and a model of type {config.model_type!r} has no attention '
            'heads to share out; leave it at 1'
        )
    if heads % size:
        raise ConfigError(
            f"`parallel.sequence_parallel_size` is {size}, which does not divide the model's {heads} heads of keys and "
            'values; use a divisor of it'
        )


def activation_budget(model: nn.Module) -> int | None:
    """The bytes for activations by which a model's fast path decides what it computes again; None: nothing decides."""
    fast = _fast_decoder(model)
    return fast.room if fast is not None and fast.by_memory else None


def set_activation_budget(model: nn.Module, room: int) -> None:
    """Decides by this room, whatever memory is free: a layer that is computed again has other last bits."""
    fast = _fast_decoder(model)
    if fast is not None:
        fast.room = room


def _fast_decoder(model: nn.Module) -> FusedDecoder | None:
    forward = _decoder_of(model)[1].__dict__.get('forward')
    return forward.fast if isinstance(forward, _Forward) else None


def _keep_on_cpu(fast: FusedDecoder) -> str:
    """Keeps weights as floats in a share of the free memory; says so."""
    dtype = fast.decoder.embed_tokens.weight.dtype
    room = int(free_bytes(torch.device('cpu')) * _KEPT_SHARE)
    kept = fast.keep_weights(dtype if dtype.is_floating_point else torch.float32, room)
    return f'{kept} of its 4-bit weights kept as floats' if kept else ''


def _tied(causal: Any, decoder: Any) -> bool:
    head = causal.get_output_embeddings() if hasattr(causal, 'get_output_embeddings') else None
    return head is None or head.weight is decoder.embed_tokens.weight


def _hooks(decoder: Any) -> str | None:
    """Hooks and a `forward` that somebody put on a module would never be called: the first such module, if any."""
    if 'forward' in decoder.__dict__:
        return 'somebody has replaced the forward of its decoder'
    for name, module in decoder.layers.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f'a hook is registered on layers.{name}'
        ours = isinstance(module, nn.Linear) or isinstance(module.__dict__.get('forward'), ShardedForward | None)
        if not ours or hasattr(module, '_hf_hook'):  # our own ones on a linear layer compute the same as its weight
            return f'somebody has replaced the forward of layers.{name}'
    return None
