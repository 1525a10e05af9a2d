"""The base that `chat` and `serve` run on: in how many bits, in which dtype, on which device."""

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
    """What the command line says of the base.

    Attributes:
        bits: 4 or 8 quantises it; 16 does not; None leaves it as the adapter was trained, or else as 16.
        dtype: 'auto', 'bf16', 'fp16' or 'fp32', as in a config: half precision on a GPU, float32 on a CPU.
        device: 'cuda' or 'cpu'; 'auto' is a GPU where there is one.
    """

    bits: int | None = None
    dtype: str = 'auto'
    device: str = 'auto'

    def quantization(self, trained: Mapping[str, Any] | None) -> QuantizationConfig | None:
        """The quantisation in force, given the `quantization` section that an adapter was trained with."""
        if self.bits is None and trained is not None:
            return QuantizationConfig(**trained)
        return QuantizationConfig(bits=self.bits) if self.bits in (4, 8) else None


AS_TRAINED = BaseChoice()


def load_base(folder: Path, choice: BaseChoice, trained: Mapping[str, Any] | None, *, trust_remote_code: bool) -> Any:
    """Loads a base and logs how it is held.

    Args:
        folder: The model's.
        choice: What the command line says.
        trained: The `quantization` section that the adapters were trained with; None: none.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded.
        UsageError: a GPU is asked for and there is none.
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
    logger.info('base %s%s', describe_base(model), ', as the adapter was trained; --bits changes that' * as_trained)
    return model


def describe_base(model: Any) -> str:
    """How a loaded model is held: 'in 4 bit, computed in bf16, on cuda:0'; 'in fp32, not quantised, on cpu'."""
    bits = next((bits for bits in (4, 8) if getattr(model, f'is_loaded_in_{bits}bit', False)), None)
    dtype = dtype_name(model.dtype)
    held = f'in {bits} bit, computed in {dtype}' if bits else f'in {dtype}, not quantised'
    return f'{held}, on {model.device}'


def log_base_notes(origins: Mapping[str, Provenance | None], base: Provenance | None, held: Any) -> None:
    """Says where a model runs on another base than it was trained on.

    Args:
        origins: The provenance of each adapter, by its name.
        base: That of the base itself, where it is a merged model.
        held: The `QuantizationConfig` in force, or None.
    """
    section = asdict(held) if held else None
    notes = {'base': merged_note(base)} | {name: base_note(origin, section) for name, origin in origins.items()}
    for name, note in notes.items():
        if note:
            logger.info('%s: %s', name, note)


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda, but PyTorch sees no GPU here; leave it out, or see `xtuner doctor`')
    return torch.device('cpu') if name == 'cpu' else default_device()
