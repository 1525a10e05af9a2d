"""What an adapter is added to: the published weights, or the 4- and 8-bit values that training saw in their place.

transformers and bitsandbytes are imported where they are needed: the published weights alone need neither.
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

_SCALES_BLOCK = 256  # scales that share one, in bitsandbytes' layers
_QUANTIZED_AT_ONCE = 2**20  # elements
_ELEMENTS_A_THREAD = 2**15  # for fewer, torch's sums take no further thread


def skeleton(folder: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """The model of a folder without its weights: parameters on the meta device, buffers as they are computed.

    Args:
        folder: Holds `config.json`.
        changes: Fields of the config that shall differ.

    Raises:
        ModelError: it is of a kind that is not known here.
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
    """Tensors that a model shares, each with the name under which it is stored; none where that is not known."""
    config = folder / 'config.json'
    if config.is_file() and read_json(config).get('tie_word_embeddings') is False:
        return {}
    try:
        model = skeleton(folder)
    except ModelError as error:
        logger.warning('%s; its tensors are merged one by one', error)
        return {}
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


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

    Attributes:
        bits: Of a quantised weight.
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
        """A tensor's rows: quantised and back where training did so, else rounded to the compute dtype."""
        if name not in self._quantized:
            return lambda start, stop: _rounded(self._reader.rows(name, start, stop), self._dtype)
        transposed = self._quantized[name].__name__ == 'Conv1D'
        rows = None
        if self._fast and not transposed and self._reader.shape(name)[1] % BLOCK == 0:
            rows = self._open_fast(name)
        return rows or self._open_whole(name, transposed)

    def _open_whole(self, name: str, transposed: bool) -> Rows:
        weight = self._reader.rows(name).to(self._device, self._dtype)
        if transposed:  # a Conv1D holds its weight transposed; a 4-bit layer does not
            whole = requantize(weight.T.contiguous(), self._settings).T
        else:
            whole = requantize(weight, self._settings, self._num_threads)
        return lambda start, stop: whole[start:stop].clone()

    def _open_fast(self, name: str) -> Rows | None:
        """The same values, held in 4 bit; None for a weight that is not finite."""
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
            """The rows of that range, turned back into floats."""
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
        raise ModelError('transformers quantises no layer of this model; use --base original')
    return classes


def requantize(weight: Tensor, quantization: QuantizationConfig, num_threads: int | None = None) -> Tensor:
    """Quantises a weight as loading does and computes its values again, in the memory of a few blocks.

    Args:
        weight: (out, in), in the compute dtype, on the device that shall quantise it; it is written over.
        quantization: 4 bit, of whatever kind, or 8 bit.
        num_threads: Of `requantize_scales`; None: torch's.

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
    # Where blocks cross rows, a part might end in the middle of one: the weight stays in one part then.
    parts = weight.split(max(1, _QUANTIZED_AT_ONCE // width)) if width % BLOCK == 0 else (weight,)
    packed = [bnb.functional.quantize_4bit(part, quant_type=kind, blocksize=BLOCK) for part in parts]
    scales = torch.cat([state.absmax for _, state in packed])
    if quantization.double_quant:  # the scales of the whole weight are quantised together
        scales = requantize_scales(scales, num_threads or torch.get_num_threads())
    counts = [part.numel() // BLOCK + bool(part.numel() % BLOCK) for part in parts]
    for part, (codes, state), own in zip(parts, packed, scales.split(counts), strict=True):
        state.absmax = own
        state.shape = torch.Size((1, part.numel()))  # on a CPU, bitsandbytes would begin a block anew with each row
        part.copy_(bnb.functional.dequantize_4bit(codes, state).reshape(part.shape))
    return weight


def requantize_scales(scales: Tensor, num_threads: int) -> Tensor:
    """Quantises a weight's scales as double quantisation does and computes their values again.

    Args:
        scales: float32 (n,), on the device that shall quantise them.
        num_threads: How many torch has where a model is loaded: the last bit of their mean depends on it.
    """
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    mean = _mean(scales, num_threads) if scales.device.type == 'cpu' else scales.mean()
    codes, state = quantize_blockwise(scales - mean, blocksize=_SCALES_BLOCK)
    return dequantize_blockwise(codes, state) + mean


def _mean(values: Tensor, num_threads: int) -> Tensor:
    """`values.mean()` as so many threads of torch compute it, in this one: the sum of each thread's sum."""
    threads = min(num_threads, -(-len(values) // _ELEMENTS_A_THREAD))
    sums = [part.sum() for part in values.split(-(-len(values) // threads))]
    return torch.stack(sums).sum() / len(values)
