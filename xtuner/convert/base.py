"""What an adapter is added to: the published weights, or the 4- and 8-bit values that training saw in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from xtuner.config.schema import QuantizationConfig
from xtuner.convert.delta import Rows
from xtuner.errors import ModelError
from xtuner.model.loading import bitsandbytes_config, load_config
from xtuner.model.weights import WeightReader

_BLOCK, _SCALES_BLOCK = 64, 256  # values that share a scale, and scales that share one, in bitsandbytes' layers
_QUANTIZED_AT_ONCE = 2**20  # elements


def skeleton(folder: Path) -> Any:
    """The model of a folder without its weights: parameters on the meta device, buffers as they are computed.

    Raises:
        ModelError: it is of a kind that is not known here.
    """
    from accelerate import init_empty_weights

    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32).eval()


class PublishedBase:
    """The weights as they are on disk."""

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader

    def open(self, name: str) -> Rows:
        """A tensor's rows, in its own dtype, on the CPU."""
        return lambda start, stop: self._reader.rows(name, start, stop)


class QuantizedBase:
    """The weights as `load_model` holds them for training, bit for bit, in the compute dtype.

    Args:
        reader: The published weights.
        quantization: How training held them.
        dtype: Training's compute dtype. Weights are rounded to it before they are quantised, as loading does.
        device: Where they are quantised; bitsandbytes has its own code for each kind of device.
    """

    def __init__(
        self,
        reader: WeightReader,
        quantization: QuantizationConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._reader, self._dtype, self._device = reader, dtype, device
        self._settings = quantization
        self._quantized = quantized_weights(skeleton(reader.folder), quantization, dtype, device)

    def open(self, name: str) -> Rows:
        """A tensor's rows: quantised and back where training did so, else rounded to the compute dtype."""
        if name not in self._quantized:
            return lambda start, stop: _rounded(self._reader.rows(name, start, stop), self._dtype)
        weight = self._reader.rows(name).to(self._device, self._dtype)
        if self._quantized[name] is Conv1D:  # holds its weight transposed; a 4-bit layer does not
            whole = requantize(weight.T.contiguous(), self._settings).T
        else:
            whole = requantize(weight, self._settings)
        return lambda start, stop: whole[start:stop].clone()


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def quantized_weights(
    model: Any, quantization: QuantizationConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, type]:
    """The weights that transformers quantises as it loads a model, each with its layer's class: its own choice.

    Args:
        model: A `skeleton`, whose layers are replaced.
        quantization: How training held them.
        dtype: Training's compute dtype.
        device: Where they are quantised.
    """
    import bitsandbytes as bnb
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = bitsandbytes_config(quantization, dtype, device)
    before = {name: type(module) for name, module in model.named_modules()}
    replaced = replace_with_bnb_linear(
        model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=config
    )
    classes = {
        f'{name}.weight': before[name]
        for name, module in replaced.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and type(module) is not before[name]
    }
    if not classes:
        raise ModelError('transformers quantises no layer of this model; use --base original')
    return classes


def requantize(weight: Tensor, quantization: QuantizationConfig) -> Tensor:
    """Quantises a weight as loading does and computes its values again, in the memory of a few blocks.

    Args:
        weight: (out, in), in the compute dtype, on the device that shall quantise it; it is written over.
        quantization: 4 bit, of whatever kind, or 8 bit.

    Returns:
        The same tensor.
    """
    import bitsandbytes as bnb

    if quantization.bits == 8:
        codes: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        codes = codes.to(weight.device)
        return weight.copy_(bnb.functional.int8_vectorwise_dequant(codes.CB, codes.SCB))
    kind = quantization.quant_type
    width = weight.shape[1]
    # Where blocks cross rows, bitsandbytes' kernels on a CPU depend on the shape: the weight stays in one part then.
    parts = weight.split(max(1, _QUANTIZED_AT_ONCE // width)) if width % _BLOCK == 0 else (weight,)
    packed = [bnb.functional.quantize_4bit(part, quant_type=kind, blocksize=_BLOCK) for part in parts]
    scales = torch.cat([state.absmax for _, state in packed])
    if quantization.double_quant:  # the scales of the whole weight are quantised together
        mean = scales.mean()
        scale_codes, state = bnb.functional.quantize_blockwise(scales - mean, blocksize=_SCALES_BLOCK)
        scales = bnb.functional.dequantize_blockwise(scale_codes, state) + mean
    counts = [part.numel() // _BLOCK + bool(part.numel() % _BLOCK) for part in parts]
    for part, (codes, state), own in zip(parts, packed, scales.split(counts), strict=True):
        state.absmax = own
        part.copy_(bnb.functional.dequantize_4bit(codes, state).reshape(part.shape))
    return weight
