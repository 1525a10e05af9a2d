"""The fused training path on a model as built by transformers and peft.

`enable_fused_training(model)` replaces the forward pass of this model's decoder in training; modules, parameters, names
and checkpoints do not change. Whatever the fused path does not support (generation, evaluation, attention masks,
caches, DoRA, several active adapters, merged adapters) goes through the model's own forward pass.
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
from xtuner.fused.offload import free_bytes, move_embedding_to_host, sync_once_per_step
from xtuner.fused.projections import static_unsupported_reason
from xtuner.fused.ulysses import SequenceGroup
from xtuner.kernels.dispatch import PLAIN, fused_kernels, has_triton

__all__ = [
    'FusedTraining',
    'activation_budget',
    'enable_fused_training',
    'fused_linear_cross_entropy',
    'set_activation_budget',
    'sync_once_per_step',
    'target_rows',
]

_CACHE_FRACTION = 0.25  # of the free memory, for dequantized 4-bit weights on a CPU
_LOGGER = logging.getLogger('xtuner')


@dataclass
class FusedTraining:
    """State of the fused training path; `str()` of it is one line for the log.

    Attributes:
        enabled: Whether the fused path is on.
        kernels: 'triton', 'plain', or '' if it is off.
        reason_disabled: Why it is off; if it is on, a note on its speed, or ''.
        embedding_on_host: Whether the input embedding is in host memory.
        fp8: Whether frozen weights and adapters are multiplied in FP8.
        fallbacks: Reasons for which batches have gone through the model's own forward pass.

    """

    enabled: bool
    kernels: str = ''
    reason_disabled: str = ''
    embedding_on_host: bool = False
    fp8: bool = False
    fallbacks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.enabled:
            return f'fused training path off: {self.reason_disabled}'
        detail = f' ({self.reason_disabled})' if self.reason_disabled else ''
        place = ', input embedding on the host' if self.embedding_on_host else ''
        products = ', products in FP8' if self.fp8 else ''
        return f'fused training path on: {self.kernels} kernels{products}{place}{detail}'


class _FusedForward:
    """Replaces one decoder's `forward`: the fused forward pass in training, the module's own otherwise."""

    def __init__(self, fused: FusedDecoder, status: FusedTraining) -> None:
        self.fused = fused
        self.status = status

    def __call__(
        self, input_ids: Tensor | None = None, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        unsupported_arguments = args or any(
            v is not None and v is not False for k, v in kwargs.items() if k != 'return_dict'
        )
        # Packs that are split over ranks take the fused path in validation, too.
        is_fused = self.fused.decoder.training or self.fused.sequence is not None
        if not is_fused or unsupported_arguments or input_ids is None:
            return self._original_forward(input_ids, *args, position_ids=position_ids, **kwargs)
        reason = self.fused.unsupported_reason()
        if reason and self.fused.sequence is not None:
            raise ConfigError(f'`parallel.sequence_parallel_size` requires the fused training path: {reason}')
        if reason:
            if reason not in self.status.fallbacks:
                self.status.fallbacks.append(reason)
                _LOGGER.warning('fused training path disabled for this batch: %s', reason)
            return self._original_forward(input_ids, position_ids=position_ids, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.fused(input_ids, position_ids))

    def _original_forward(
        self, input_ids: Tensor | None, *args: Any, position_ids: Tensor | None, **kwargs: Any
    ) -> Any:
        decoder = self.fused.decoder
        if position_ids is not None:  # the fused path takes them from the host
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
    """Enables the fused training path for a model if it is supported.

    Args:
        model: A transformers causal language model, bare or wrapped by peft. Changed in place: its decoder's `forward`
            is replaced on the instance. Attach adapters first.
        enabled: False disables the fused path if it was on.
        embedding_on_host: On CUDA, keep a frozen, untied input embedding in host memory; a batch needs only a few of
            its rows, which the GPU reads over PCIe.
        recompute_by_memory: Recompute as few layers as the free memory allows, instead of all or none according to the
            model's own checkpointing setting (which still applies to batches off the fused path).
        fp8: Multiply frozen weights and adapters in FP8.
        sharded: Whether `fully_shard` will be applied to the layers.

    Returns:
        The state of the fused path and why it is off; `str()` of it is one line.

    Raises:
        ConfigError: `fp8`, and products cannot be computed in FP8.

    Example:
        status = enable_fused_training(peft_model); print(status)  ->  fused training path on: triton kernels

    """
    causal, decoder = _decoder_of(model)
    if isinstance(decoder.__dict__.get('forward'), _FusedForward):
        del decoder.forward
    reason = (static_unsupported_reason(decoder) or _hooks(decoder)) if enabled else 'switched off'
    if reason and fp8:
        raise ConfigError(f'`runtime.fp8` requires the fused training path, which is off: {reason}')
    if reason:
        return FusedTraining(False, reason_disabled=reason)
    device = next(decoder.layers[0].parameters()).device
    on_cuda = device.type == 'cuda'
    kernels = fused_kernels() if on_cuda and has_triton() else PLAIN
    status = FusedTraining(True, kernels.name, fp8=fp8)
    fused = FusedDecoder(decoder, kernels, fused_lora=on_cuda, by_memory=recompute_by_memory, fp8=fp8, sharded=sharded)
    _refuse_fp8(fp8_unsupported_reason(fused) if fp8 else None)
    if device.type == 'cpu' and not sharded:
        status.reason_disabled = _cache_weights_on_cpu(fused)
    elif on_cuda and kernels is PLAIN:
        status.reason_disabled = 'Triton is not installed; its kernels are faster'
    if on_cuda and embedding_on_host and not _tied(causal, decoder):
        status.embedding_on_host = move_embedding_to_host(decoder.embed_tokens)
    decoder.forward = _FusedForward(fused, status)
    return status


def _decoder_of(model: nn.Module) -> tuple[Any, Any]:
    """The causal language model behind peft's wrapper, and its decoder."""
    outer: Any = model
    causal = outer.get_base_model() if hasattr(outer, 'get_base_model') else outer
    return causal, causal.get_decoder() if hasattr(causal, 'get_decoder') else causal


def reads_host_positions(decoder: Any) -> bool:
    """Whether a decoder reads sample boundaries from position ids on the host, as the fused path does."""
    return isinstance(getattr(decoder, 'forward', None), _FusedForward)


def share_sequences(model: nn.Module, ranks: SequenceGroup) -> None:
    """Splits each row of a training batch over ranks (sequence parallelism).

    Args:
        model: The model that `enable_fused_training` was called on.
        ranks: The ranks that share rows.

    Raises:
        ConfigError: the fused path is off, or the number of heads is not divisible by the number of ranks.

    """
    decoder = _decoder_of(model)[1]
    forward = decoder.__dict__.get('forward')
    if not isinstance(forward, _FusedForward):
        raise ConfigError(
            '`parallel.sequence_parallel_size` requires the fused training path, which is off for this model'
        )
    check_heads(decoder.config, ranks.size)
    forward.fused.sequence = ranks


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError if a device does not support `runtime.fp8`, whatever the model is."""
    _refuse_fp8(device_unsupported_reason(device))


def _refuse_fp8(reason: str | None) -> None:
    if reason:
        raise ConfigError(f'`runtime.fp8`: {reason}; leave it out')


def check_heads(config: Any, size: int) -> None:
    """Raises ConfigError if a model's heads cannot be split evenly over `size` ranks."""
    if size == 1:
        return
    text = config.get_text_config(decoder=True)
    heads = getattr(text, 'num_key_value_heads', None) or getattr(text, 'num_attention_heads', None)
    if not isinstance(heads, int):
        raise ConfigError(
            f'`parallel.sequence_parallel_size` is {size}, and a model of type {config.model_type!r} has no attention '
            'heads to split; leave it at 1'
        )
    if heads % size:
        raise ConfigError(
            f"`parallel.sequence_parallel_size` is {size}, which does not divide the model's {heads} key and value "
            f'heads; use a divisor of {heads}'
        )


def activation_budget(model: nn.Module) -> int | None:
    """The activation budget in bytes, by which layers are recomputed; None: they are not recomputed by memory."""
    fused = _fused_decoder(model)
    return fused.memory.budget if fused is not None and fused.memory.by_memory else None


def set_activation_budget(model: nn.Module, num_bytes: int) -> None:
    """Sets the activation budget, so that a resumed run recomputes the same layers: recomputing changes last bits."""
    fused = _fused_decoder(model)
    if fused is not None:
        fused.memory.budget = num_bytes


def _fused_decoder(model: nn.Module) -> FusedDecoder | None:
    forward = _decoder_of(model)[1].__dict__.get('forward')
    return forward.fused if isinstance(forward, _FusedForward) else None


def _cache_weights_on_cpu(fused: FusedDecoder) -> str:
    """Dequantizes 4-bit weights into a share of the free memory; returns a note for the log."""
    dtype = fused.decoder.embed_tokens.weight.dtype
    budget = int(free_bytes(torch.device('cpu')) * _CACHE_FRACTION)
    num_cached = fused.cache_dequantized(dtype if dtype.is_floating_point else torch.float32, budget)
    return f'{num_cached} of its 4-bit weights cached as floats' if num_cached else ''


def _tied(causal: Any, decoder: Any) -> bool:
    head = causal.get_output_embeddings() if hasattr(causal, 'get_output_embeddings') else None
    return head is None or head.weight is decoder.embed_tokens.weight


def _hooks(decoder: Any) -> str | None:
    """Names the first module with a hook or a replaced `forward`, which the fused path would not call; None if none."""
    if 'forward' in decoder.__dict__:
        return 'the forward of its decoder has been replaced'
    for name, module in decoder.layers.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f'a hook is registered on layers.{name}'
        ours = isinstance(module, nn.Linear) or isinstance(module.__dict__.get('forward'), ShardedForward | None)
        if not ours or hasattr(
            module, '_hf_hook'
        ):  # our own replacements on linear layers compute the same as their weight
            return f'the forward of layers.{name} has been replaced'
    return None
