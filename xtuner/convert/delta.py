"""What an adapter adds to a weight, from its files alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from xtuner.errors import CheckpointError

_PREFIX = 'base_model.model.'
_PART = re.compile(r'^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$')


@dataclass(frozen=True)
class LoraModule:
    """The tensors of one adapted linear layer.

    Attributes:
        down: lora_A, float (r, in).
        up: lora_B, float (out, r).
        scale: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv:2312.03732).
        magnitude: DoRA's row magnitudes (out,) (arXiv:2402.09353), or None.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The merged weight.

        Args:
            weight: (out, in), any float dtype.

        Returns:
            float32 (out, in): `W + scale * B A`, its rows rescaled to the magnitudes where the adapter is a DoRA.
        """
        merged = torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.scale)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.float() / merged.norm(dim=1))[:, None]


class AdapterFile:
    """A saved LoRA adapter, read one module at a time.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: another kind of adapter, or a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8'))
            self._file = safe_open(folder / 'adapter_model.safetensors', 'pt')
            names = list(self._file.keys())
        except Exception as error:
            raise CheckpointError(f'{folder}: the adapter cannot be read: {error}') from error
        self._check_supported()
        self._parts: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key in names:
            name = key.removeprefix(_PREFIX)
            if match := _PART.match(name):
                self._parts.setdefault(match['module'], {})[match['part']] = key
            else:  # modules_to_save and trained biases: they replace the base's tensor
                self._whole[name.replace('.base_layer.', '.')] = key

    @property
    def targets(self) -> set[str]:
        """Names of the base's tensors that the adapter changes."""
        return {f'{module}.weight' for module in self._parts} | set(self._whole)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The merged tensor of that name: float32 where the adapter changes it, else as it came."""
        if name in self._whole:
            return self._file.get_tensor(self._whole[name]).float()
        module = name.removesuffix('.weight')
        return self._lora(module).apply(weight) if module in self._parts else weight

    def _lora(self, module: str) -> LoraModule:
        tensors = {part: self._file.get_tensor(key) for part, key in self._parts[module].items()}
        if 'lora_A' not in tensors or 'lora_B' not in tensors:
            raise CheckpointError(f'{self._folder}: {module} has only {", ".join(tensors)}')
        down = tensors['lora_A']
        alpha = _pattern(self.config.get('alpha_pattern') or {}, module, self.config['lora_alpha'])
        divisor = math.sqrt(down.shape[0]) if self.config.get('use_rslora') else down.shape[0]
        return LoraModule(down, tensors['lora_B'], alpha / divisor, tensors.get('lora_magnitude_vector'))

    def _check_supported(self) -> None:
        kind = self.config.get('peft_type')
        if kind != 'LORA':
            raise CheckpointError(f'{self._folder}: only LoRA adapters can be merged, this one is {kind}')
        for key in ('fan_in_fan_out', 'lora_bias'):
            if self.config.get(key):
                raise CheckpointError(f'{self._folder}: `{key}` is not supported by merge')


def _pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name from its end, as peft reads them."""
    for pattern, value in patterns.items():
        if re.match(rf'(.*\.)?({pattern})$', module):
            return value
    return default
