"""Reads a LoRA adapter's files: the base tensors that it changes, and their changes, one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from xtuner.adapters.delta import BiasDelta, Delta, LoraDelta, Replaced, Rows, TokenDelta
from xtuner.adapters.load import AdapterWeights
from xtuner.adapters.settings import check_patterns, read_adapter_settings
from xtuner.errors import CheckpointError
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import fingerprint

_PREFIX = 'base_model.model.'
_PARTS = {
    'lora_A': 'a', 'lora_B': 'b', 'lora_embedding_A': 'a', 'lora_embedding_B': 'b',
    'lora_magnitude_vector': 'magnitude', 'token_adapter.trainable_tokens_delta': 'tokens',
}  # fmt: skip
_PART = re.compile(rf'(?P<module>.+)\.(?P<part>{"|".join(map(re.escape, _PARTS))})(\.weight|(?P<bias>\.bias))?')
# Initializations that leave the base unchanged. All others of peft change it, and an adapter with one of them belongs
# to the changed base, unless it was saved as a plain one (`path_initial_model_for_weight_conversion`).
_PLAIN_INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
# Variants that are not a fixed change of the weights, or that peft stores in another layout.
_UNSUPPORTED = (
    'alora_invocation_tokens', 'arrow_config', 'kasa_config', 'layer_replication', 'megatron_config',
    'monteclora_config', 'target_parameters', 'use_bdlora', 'use_qalora',
)  # fmt: skip


class AdapterFile:
    """A saved LoRA adapter.

    Args:
        folder: Contains `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        device: Device for the tensors that are read.

    Attributes:
        config: Content of `adapter_config.json`.
        targets: Names of the base tensors that it changes.

    Raises:
        CheckpointError: Unsupported adapter type, unreadable file, or unknown tensor.
    """

    def __init__(self, folder: Path, device: torch.device | str = 'cpu') -> None:
        self.folder = folder
        self._device = torch.device(device)
        self.config = read_adapter_settings(folder)
        weights = AdapterWeights(folder)
        self._check_supported()
        self._reader = weights.reader
        self._parts: dict[str, dict[str, str]] = {}  # by the name of the base's tensor
        for name, key in weights.keys.items():
            target, part = _target_and_part(name.removeprefix(_PREFIX))
            self._parts.setdefault(target, {})[part] = key
        modules = [target.rpartition('.')[0] for target in self._parts]
        check_patterns(self.config, modules, str(folder / 'adapter_config.json'))

    @property
    def targets(self) -> set[str]:
        """Names of the base tensors that the adapter changes."""
        return set(self._parts)

    @property
    def keeps_ties(self) -> bool:
        """Whether an output head that is tied to the embedding stays tied and gets the same change."""
        shared = any('tokens' in parts for parts in self._parts.values())
        return shared or bool(self.config.get('ensure_weight_tying'))

    def check_pairs(self) -> None:
        """Raises CheckpointError if only one of the two LoRA factors of a tensor is present."""
        for target, parts in self._parts.items():
            if len(parts.keys() & {'b', 'a'}) == 1 or (parts.keys() == {'magnitude'}):
                raise CheckpointError(f'{self.folder}: for {target} only {", ".join(parts.values())} is present')

    def fingerprint(self) -> str:
        """A hash of the settings and of samples of the tensors."""
        return f'{fingerprint(self._reader)} {json.dumps(self.config, sort_keys=True)}'

    def shape(self, target: str, base: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the changed tensor: the base's, unless the adapter brings a resized tensor.

        Raises:
            CheckpointError: The adapter's tensors do not fit.
        """
        parts = self._parts[target]
        shape = self._reader.shape(parts['whole']) if 'whole' in parts else base
        if 'b' in parts:
            b, a = (self._reader.shape(parts[part]) for part in ('b', 'a'))
            fits = len(b) == 2 and len(a) == 2 and len(shape) == 2 and b[1] == a[0]
            if not fits or sorted((b[0], a[1])) != sorted(shape):
                raise CheckpointError(
                    f'{self.folder}: {target} is {shape}, which lora_B {b} and lora_A {a} do not fit; is this the '
                    'base that it was trained on?'
                )
        if 'whole' in parts and (len(shape) != len(base) or shape[1:] != base[1:]):
            raise CheckpointError(f'{self.folder}: {target} is {shape} in the adapter but {base} in the base')
        return shape

    def untrained(self) -> list[str]:
        """Targets without a change: a LoRA factor is all zero, and nothing else was trained."""
        low_rank = {t: parts for t, parts in self._parts.items() if not parts.keys() & {'whole', 'magnitude'}}
        factors = ('b', 'a', 'bias')
        return sorted(
            target for target, parts in low_rank.items()
            if any(not self._read(parts[factor]).any() for factor in factors if factor in parts)
        )  # fmt: skip

    def may_be_unchanged(self, target: str) -> bool:
        """Whether a tensor may be an untrained copy of the base's, since peft saves resized embeddings."""
        trained = [*(self.config.get('modules_to_save') or []), *(self.config.get('target_modules') or [])]
        modules = target.split('.')
        return (
            self._parts[target].keys() == {'whole'}
            and not target.endswith('.bias')
            and not (any(name.rpartition('.')[2] in modules for name in trained))
        )

    def delta(self, target: str, weight: Rows, shape: tuple[int, ...]) -> Delta:
        """Returns the change of a tensor.

        Args:
            target: One of `targets`.
            weight: Opens the base's tensor, which DoRA needs for its norms.
            shape: Shape of the changed tensor.
        """
        parts = self._parts[target]
        whole = Replaced(self._rows(parts['whole'])) if 'whole' in parts else None
        if 'b' in parts:
            lora = self._lora(target, parts)
            if 'magnitude' in parts:
                source = whole.values if whole else weight
                by_row = not self._transposed(parts)
                lora = lora.with_magnitude(self._read(parts['magnitude']), source, row_blocks(shape), by_row=by_row)
            return _Composed(whole, lora) if whole else lora
        if 'bias' in parts:
            bias = BiasDelta(self._read(parts['bias']), self._scale(target, self._rank_of_bias(target)))
            return _Composed(whole, bias) if whole else bias
        if 'tokens' in parts:
            tokens = TokenDelta(self._indices(target), self._read(parts['tokens']))
            return _Composed(whole, tokens) if whole else tokens
        assert whole is not None
        return whole

    def _lora(self, target: str, parts: Mapping[str, str]) -> LoraDelta:
        a, b = self._read(parts['a']), self._read(parts['b'])
        scale = self._scale(target, a.shape[0])
        if self._transposed(parts):
            a, b = b.T.contiguous(), a.T.contiguous()
        return LoraDelta(b, a, scale)

    def _transposed(self, parts: Mapping[str, str]) -> bool:
        """Whether the weight has a row for each input, as an embedding or a Conv1D."""
        return 'lora_embedding' in parts['b'] or bool(self.config.get('fan_in_fan_out'))

    def _scale(self, target: str, rank: int) -> float:
        module = target.rpartition('.')[0]
        alpha = _pattern(self.config.get('alpha_pattern') or {}, module, self.config['lora_alpha'])
        return alpha / (math.sqrt(rank) if self.config.get('use_rslora') else rank)

    def _rank_of_bias(self, bias: str) -> int:
        """The LoRA rank of the layer that a bias belongs to."""
        return self._reader.shape(self._parts[bias.removesuffix('bias') + 'weight']['a'])[0]

    def _indices(self, target: str) -> Tensor:
        indices = self.config.get('trainable_token_indices')
        if isinstance(indices, dict):
            module = target.rpartition('.')[0]
            indices = next((v for k, v in indices.items() if re.search(rf'(^|\.){re.escape(k)}$', module)), None)
        if not indices:
            raise CheckpointError(f'{self.folder}: has trained tokens of {target}, but adapter_config.json lists none')
        return torch.tensor(indices, device=self._device)

    def _read(self, key: str) -> Tensor:
        return self._reader.rows(key).to(self._device).float()

    def _rows(self, key: str) -> Rows:
        return lambda start, stop: self._reader.rows(key, start, stop).to(self._device).float()

    def _check_supported(self) -> None:
        kind = self.config.get('peft_type')
        if kind != 'LORA':
            raise CheckpointError(f'{self.folder}: only LoRA adapters can be merged; this is {kind}')
        if used := [key for key in _UNSUPPORTED if self.config.get(key)]:
            raise CheckpointError(f'{self.folder}: `{used[0]}` cannot be merged: not a fixed change of the weights')
        init = self.config.get('init_lora_weights')
        if init not in _PLAIN_INITS:
            raise CheckpointError(
                f'{self.folder}: it was initialized with {init!r}, which changes the base as well; save it again from '
                'peft as a plain adapter (`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)'
            )


class _Composed:
    """A change on top of a tensor that the adapter brings as a whole, such as LoRA on a resized embedding."""

    def __init__(self, whole: Replaced, then: Delta) -> None:
        self._whole, self._then = whole, then

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """See `Delta.rows`."""
        return self._then.rows(self._whole.rows(base, start, stop), start, stop)


def _target_and_part(name: str) -> tuple[str, str]:
    """Returns the base tensor that an adapter's tensor belongs to, and its part in the change."""
    match = _PART.fullmatch(name)
    if not match:  # modules_to_save and trained biases: they replace the base's tensor
        return name.replace('.base_layer.', '.').replace('.modules_to_save.', '.'), 'whole'
    module, part = match['module'].removesuffix('.base_layer'), match['part']
    if match['bias']:
        return f'{module}.bias', 'bias'
    return f'{module}.weight', _PARTS[part]


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Returns the value of the first pattern that matches the end of the module's name, as in peft."""
    for pattern, value in patterns.items():
        if re.match(rf'(.*\.)?({pattern})$', module):
            return value
    return default
