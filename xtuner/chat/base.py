"""Loads the base model of `chat` and `serve`: quantization, compute dtype and device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.adapters.attach import Provenance
from xtuner.adapters.trained_base import base_note, merged_note
from xtuner.config.schema import QuantizationConfig
from xtuner.errors import UsageError
from xtuner.model.loading import load_model
from xtuner.model.precision import compute_dtype, default_device, dtype_name

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class BaseChoice:
    """Command-line options of the base model.

    Attributes:
        bits: 4 or 8 to quantize, 16 not to; None means as the adapter was trained, otherwise 16.
        dtype: 'auto', 'bf16', 'fp16' or 'fp32', as in a config; auto is half precision on a GPU, float32 on a CPU.
        device: 'cuda' or 'cpu'; 'auto' selects a GPU if there is one.
    """

    bits: int | None = None
    dtype: str = 'auto'
    device: str = 'auto'

    def quantization(self, trained: Mapping[str, Any] | None) -> QuantizationConfig | None:
        """The quantization to use, given the `quantization` section that an adapter was trained with."""
        if self.bits is None and trained is not None:
            return QuantizationConfig(**trained)
        return QuantizationConfig(bits=self.bits) if self.bits in (4, 8) else None


AS_TRAINED = BaseChoice()


def load_base(folder: Path, choice: BaseChoice, trained: Mapping[str, Any] | None, *, trust_remote_code: bool) -> Any:
    """Loads a base model and logs its precision and device.

    Args:
        folder: The folder of the model.
        choice: Options of the command line.
        trained: The `quantization` section that the adapters were trained with; None if they were trained without.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded.
        UsageError: a GPU is requested but not available.
    """
    device = _device(choice.device)
    model = load_model(
        folder,
        dtype=compute_dtype(choice.dtype, device),
        quantization=choice.quantization(trained),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    as_trained = choice.bits is None and trained is not None
    logger.info(
        'base model: %s%s', describe_base(model), ', as the adapter was trained (change with --bits)' * as_trained
    )
    return model


def describe_base(model: Any) -> str:
    """Describes a loaded model, e.g. '4 bits, compute dtype bf16, on cuda:0' or 'fp32, unquantized, on cpu'."""
    bits = next((bits for bits in (4, 8) if getattr(model, f'is_loaded_in_{bits}bit', False)), None)
    dtype = dtype_name(model.dtype)
    precision = f'{bits} bits, compute dtype {dtype}' if bits else f'{dtype}, unquantized'
    return f'{precision}, on {model.device}'


def log_base_notes(origins: Mapping[str, Provenance | None], base: Provenance | None, quantization: Any) -> None:
    """Logs each adapter that runs on a base other than the one it was trained on.

    Args:
        origins: The provenance of each adapter, by name.
        base: The provenance of the base, if it is a merged model.
        quantization: The `QuantizationConfig` in use, or None.
    """
    section = asdict(quantization) if quantization else None
    notes = {'base': merged_note(base)} | {name: base_note(origin, section) for name, origin in origins.items()}
    for name, note in notes.items():
        if note:
            logger.info('%s: %s', name, note)


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        raise UsageError(
            '--device cuda: PyTorch finds no GPU on this machine; remove the option, or run `xtuner doctor`'
        )
    return torch.device('cpu') if name == 'cpu' else default_device()
