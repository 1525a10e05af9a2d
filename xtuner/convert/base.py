"""Base weights for a merge: the published weights, or the 4- or 8-bit values that training used instead.

transformers and bitsandbytes are imported lazily: merging with the published weights needs neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.adapters.delta import Rows
from xtuner.config.schema import QuantizationConfig
from xtuner.errors import ModelError
from xtuner.model.hub import read_json
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.nf4 import BLOCK, quantize_nf4
from xtuner.model.weights.reader import WeightReader

logger = logging.getLogger('xtuner')

_SCALES_BLOCK = 256  # scales per coarse scale in bitsandbytes' layers
_QUANTIZED_AT_ONCE = 2**20  # elements quantized per call
_ELEMENTS_PER_THREAD = 2**15  # torch's sums use one thread for each so many elements


def skeleton(folder: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """Builds the model of a folder without weights: parameters on the meta device, buffers computed.

    Args:
        folder: Holds `config.json`.
        changes: Fields of the config to override.

    Raises:
        ModelError: The architecture is unknown.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from xtuner.model.loading import load_config

    config = load_config(folder)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32).eval()


def shared_tensors(folder: Path) -> dict[str, str]:
    """Returns the tied tensors of a model, each with the name under which it is stored; empty if unknown."""
    config = folder / 'config.json'
    if config.is_file() and read_json(config).get('tie_word_embeddings') is False:
        return {}
    try:
        model = skeleton(folder)
    except ModelError as error:
        logger.warning('%s; its tensors are merged without tying', error)
        return {}
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


class PublishedBase:
    """The weights as stored on disk."""

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader

    def open(self, name: str) -> Rows:
        """Opens the rows of a tensor, in its own dtype, on the CPU."""
        return lambda start, stop: self._reader.rows(name, start, stop)


class QuantizedBase:
    """The weights as `load_model` holds them for training, bit for bit, in the compute dtype.

    Args:
        reader: The published weights.
        quantization: How training quantized them.
        dtype: Training's compute dtype; weights are rounded to it before they are quantized, as in loading.
        device: Where they are quantized; bitsandbytes has different code for each device type.

    Attributes:
        bits: Bits of a quantized weight.
    """

    def __init__(
        self,
        reader: WeightReader,
        quantization: QuantizationConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bits = quantization.bits
        self._reader, self._dtype, self._device = reader, dtype, device
        self._settings = quantization
        self._num_threads = torch.get_num_threads()
        self._quantized = quantized_weights(skeleton(reader.folder), quantization, dtype, device)
        fast = quantization.bits == 4 and quantization.quant_type == 'nf4' and device.type == 'cpu'
        self._fast = fast and dtype.itemsize == 2

    def open(self, name: str) -> Rows:
        """Opens a tensor's rows: quantized and dequantized if training did so, else rounded to the compute dtype."""
        if name not in self._quantized:
            return lambda start, stop: _rounded(self._reader.rows(name, start, stop), self._dtype)
        transposed = self._quantized[name].__name__ == 'Conv1D'
        rows = None
        if self._fast and not transposed and self._reader.shape(name)[1] % BLOCK == 0:
            rows = self._open_fast(name)
        return rows or self._open_whole(name, transposed)

    def _open_whole(self, name: str, transposed: bool) -> Rows:
        weight = self._reader.rows(name).to(self._device, self._dtype)
        if transposed:  # a Conv1D stores its weight transposed; a 4-bit layer does not
            whole = requantize(weight.T.contiguous(), self._settings).T
        else:
            whole = requantize(weight, self._settings, self._num_threads)
        return lambda start, stop: whole[start:stop].clone()

    def _open_fast(self, name: str) -> Rows | None:
        """Same values, held in 4 bits; returns None for a weight that is not finite."""
        shape = self._reader.shape(name)
        blocks = (_rounded(self._reader.rows(name, *rows), self._dtype) for rows in row_blocks(shape))
        parts = [quantize_nf4(block) for block in blocks]
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        if not scales.isfinite().all():
            return None
        if self._settings.double_quant:
            scales = requantize_scales(scales, self._num_threads)
        width = shape[1]

        def rows(start: int, stop: int) -> Tensor:
            """Dequantizes a range of rows."""
            first, last = start * width, stop * width
            return torch.ops.bitsandbytes.dequantize_4bit.default(
                codes[first // 2 : last // 2], scales[first // BLOCK : last // BLOCK], BLOCK, 'nf4',
                (stop - start, width), self._dtype,
            )  # fmt: skip

        return rows


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    return tensor.float().to(dtype)  # torch converts between 16-bit types several times slower


def quantized_weights(
    model: Any, quantization: QuantizationConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, type]:
    """Returns the weights that transformers quantizes when it loads a model, each with the class of its layer.

    Args:
        model: A `skeleton`, whose layers are replaced.
        quantization: How training quantized them.
        dtype: Training's compute dtype.
        device: Where they are quantized.
    """
    import bitsandbytes as bnb
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from xtuner.model.loading import bitsandbytes_config

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
        raise ModelError('transformers quantizes no layer of this model; use --base original')
    return classes


def requantize(weight: Tensor, quantization: QuantizationConfig, num_threads: int | None = None) -> Tensor:
    """Quantizes a weight as loading does and dequantizes it in place, with temporary memory for a few blocks only.

    Args:
        weight: (out, in), in the compute dtype, on the device that quantizes it; overwritten.
        quantization: 4 bits of any type, or 8 bits.
        num_threads: Threads for `requantize_scales`; None: torch's.

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
    # If blocks cross rows, a part could end within a block, so the weight stays in one part.
    parts = weight.split(max(1, _QUANTIZED_AT_ONCE // width)) if width % BLOCK == 0 else (weight,)
    packed = [bnb.functional.quantize_4bit(part, quant_type=kind, blocksize=BLOCK) for part in parts]
    scales = torch.cat([state.absmax for _, state in packed])
    if quantization.double_quant:  # the scales of the whole weight are quantized together
        scales = requantize_scales(scales, num_threads or torch.get_num_threads())
    counts = [part.numel() // BLOCK + bool(part.numel() % BLOCK) for part in parts]
    for part, (codes, state), part_scales in zip(parts, packed, scales.split(counts), strict=True):
        state.absmax = part_scales
        state.shape = torch.Size((1, part.numel()))  # on a CPU, bitsandbytes would start a new block at each row
        part.copy_(bnb.functional.dequantize_4bit(codes, state).reshape(part.shape))
    return weight


def requantize_scales(scales: Tensor, num_threads: int) -> Tensor:
    """Quantizes a weight's scales as double quantization does, and dequantizes them.

    Args:
        scales: float32 (n,), on the device that quantizes them.
        num_threads: Number of torch threads when the model is loaded; the last bit of the scales' mean depends on it.
    """
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    mean = _mean(scales, num_threads) if scales.device.type == 'cpu' else scales.mean()
    codes, state = quantize_blockwise(scales - mean, blocksize=_SCALES_BLOCK)
    return dequantize_blockwise(codes, state) + mean


def _mean(values: Tensor, num_threads: int) -> Tensor:
    """`values.mean()` as computed by so many torch threads, on this thread: the sum of each thread's sum."""
    threads = min(num_threads, -(-len(values) // _ELEMENTS_PER_THREAD))
    sums = [part.sum() for part in values.split(-(-len(values) // threads))]
    return torch.stack(sums).sum() / len(values)
