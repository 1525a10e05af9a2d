"""A LoRA adapter's files: which of the base's tensors it changes, and how, read one tensor at a time."""

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
    'lora_A': 'down', 'lora_B': 'up', 'lora_embedding_A': 'down', 'lora_embedding_B': 'up',
    'lora_magnitude_vector': 'magnitude', 'token_adapter.trainable_tokens_delta': 'tokens',
}  # fmt: skip
_PART = re.compile(rf'(?P<module>.+)\.(?P<part>{"|".join(map(re.escape, _PARTS))})(\.weight|(?P<bias>\.bias))?')
# Ways to begin that leave the base as it was published. All others of peft change it, and an adapter that was begun
# so belongs to that other base, unless it was saved as a plain one (`path_initial_model_for_weight_conversion`).
_PLAIN_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
# Variants whose effect is no fixed change of the weights, or one that peft lays out in another way.
_REFUSED = (
    'alora_invocation_tokens', 'arrow_config', 'kasa_config', 'layer_replication', 'megatron_config',
    'monteclora_config', 'target_parameters', 'use_bdlora', 'use_qalora',
)  # fmt: skip


class AdapterFile:
    """A saved LoRA adapter.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        device: Where its tensors are put as they are read.

    Attributes:
        config: What `adapter_config.json` says.
        targets: Names of the base's tensors that it changes.

    Raises:
        CheckpointError: another kind of adapter, a file that cannot be read, or a tensor that has no meaning here.
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
            target, part = _place(name.removeprefix(_PREFIX))
            self._parts.setdefault(target, {})[part] = key
        modules = [target.rpartition('.')[0] for target in self._parts]
        check_patterns(self.config, modules, str(folder / 'adapter_config.json'))

    @property
    def targets(self) -> set[str]:
        """Names of the base's tensors that the adapter changes."""
        return set(self._parts)

    @property
    def keeps_ties(self) -> bool:
        """Whether an output head that shares the embedding's tensor goes on sharing it, and its changes."""
        shared = any('tokens' in parts for parts in self._parts.values())
        return shared or bool(self.config.get('ensure_weight_tying'))

    def check_pairs(self) -> None:
        """Raises CheckpointError where there is one factor of a low-rank update without the other."""
        for target, parts in self._parts.items():
            if len(parts.keys() & {'up', 'down'}) == 1 or (parts.keys() == {'magnitude'}):
                raise CheckpointError(f'{self.folder}: for {target} there is only {", ".join(parts.values())}')

    def fingerprint(self) -> str:
        """A hash of its settings and of samples of its tensors."""
        return f'{fingerprint(self._reader)} {json.dumps(self.config, sort_keys=True)}'

    def shape(self, target: str, base: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the changed tensor: the base's, unless the adapter brings the whole tensor in another size.

        Raises:
            CheckpointError: what the adapter adds does not fit.
        """
        parts = self._parts[target]
        shape = self._reader.shape(parts['whole']) if 'whole' in parts else base
        if 'up' in parts:
            up, down = (self._reader.shape(parts[part]) for part in ('up', 'down'))
            fits = len(up) == 2 and len(down) == 2 and len(shape) == 2 and up[1] == down[0]
            if not fits or sorted((up[0], down[1])) != sorted(shape):
                raise CheckpointError(
                    f'{self.folder}: {target} is {shape}, which lora_B {up} and lora_A {down} do not fit; is this the '
                    'base that it was trained on?'
                )
        if 'whole' in parts and (len(shape) != len(base) or shape[1:] != base[1:]):
            raise CheckpointError(f'{self.folder}: {target} is {shape} here and {base} in the base')
        return shape

    def untrained(self) -> list[str]:
        """Targets that cannot have changed: a factor of the low-rank update is all zero, and nothing else trained."""
        low_rank = {t: parts for t, parts in self._parts.items() if not parts.keys() & {'whole', 'magnitude'}}
        factors = ('up', 'down', 'bias')
        return sorted(
            target for target, parts in low_rank.items()
            if any(not self._read(parts[factor]).any() for factor in factors if factor in parts)
        )  # fmt: skip

    def carried(self, target: str) -> bool:
        """Whether a whole tensor merely came along (peft saves embeddings it has resized), so that it may be equal."""
        trained = [*(self.config.get('modules_to_save') or []), *(self.config.get('target_modules') or [])]
        modules = target.split('.')
        return (
            self._parts[target].keys() == {'whole'}
            and not target.endswith('.bias')
            and not (any(name.rpartition('.')[2] in modules for name in trained))
        )

    def delta(self, target: str, weight: Rows, shape: tuple[int, ...]) -> Delta:
        """What the adapter does to a tensor.

        Args:
            target: One of `targets`.
            weight: The base's tensor, which a DoRA needs for its norms.
            shape: Of the changed tensor.
        """
        parts = self._parts[target]
        whole = Replaced(self._rows(parts['whole'])) if 'whole' in parts else None
        if 'up' in parts:
            lora = self._low_rank(target, parts)
            if 'magnitude' in parts:
                source = whole.values if whole else weight
                by_row = not self._transposed(parts)
                lora = lora.with_magnitude(self._read(parts['magnitude']), source, row_blocks(shape), by_row=by_row)
            return _Composed(whole, lora) if whole else lora
        if 'bias' in parts:
            added = BiasDelta(self._read(parts['bias']), self._scale(target, self._down(target)))
            return _Composed(whole, added) if whole else added
        if 'tokens' in parts:
            tokens = TokenDelta(self._indices(target), self._read(parts['tokens']))
            return _Composed(whole, tokens) if whole else tokens
        assert whole is not None
        return whole

    def _low_rank(self, target: str, parts: Mapping[str, str]) -> LoraDelta:
        down, up = self._read(parts['down']), self._read(parts['up'])
        scale = self._scale(target, down.shape[0])
        if self._transposed(parts):
            down, up = up.T.contiguous(), down.T.contiguous()
        return LoraDelta(up, down, scale)

    def _transposed(self, parts: Mapping[str, str]) -> bool:
        """Whether the weight has a row for each input: an embedding, a Conv1D."""
        return 'lora_embedding' in parts['up'] or bool(self.config.get('fan_in_fan_out'))

    def _scale(self, target: str, rank: int) -> float:
        module = target.rpartition('.')[0]
        alpha = _pattern(self.config.get('alpha_pattern') or {}, module, self.config['lora_alpha'])
        return alpha / (math.sqrt(rank) if self.config.get('use_rslora') else rank)

    def _down(self, bias: str) -> int:
        """The rank of the layer whose bias this is."""
        return self._reader.shape(self._parts[bias.removesuffix('bias') + 'weight']['down'])[0]

    def _indices(self, target: str) -> Tensor:
        indices = self.config.get('trainable_token_indices')
        if isinstance(indices, dict):
            module = target.rpartition('.')[0]
            indices = next((v for k, v in indices.items() if re.search(rf'(^|\.){re.escape(k)}$', module)), None)
        if not indices:
            raise CheckpointError(f'{self.folder}: it has tokens of {target}, but adapter_config.json names none')
        return torch.tensor(indices, device=self._device)

    def _read(self, key: str) -> Tensor:
        return self._reader.rows(key).to(self._device).float()

    def _rows(self, key: str) -> Rows:
        return lambda start, stop: self._reader.rows(key, start, stop).to(self._device).float()

    def _check_supported(self) -> None:
        kind = self.config.get('peft_type')
        if kind != 'LORA':
            raise CheckpointError(f'{self.folder}: only LoRA adapters can be merged, this one is {kind}')
        if found := [key for key in _REFUSED if self.config.get(key)]:
            raise CheckpointError(f'{self.folder}: `{found[0]}` cannot be merged: it is no plain change of the weights')
        start = self.config.get('init_lora_weights')
        if start not in _PLAIN_STARTS:
            raise CheckpointError(
                f'{self.folder}: it was begun with {start!r}, which changes the base as well; save it again from peft '
                'as a plain adapter (`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)'
            )


class _Composed:
    """A change of a tensor that the adapter brings whole, such as LoRA on a resized embedding."""

    def __init__(self, whole: Replaced, then: Delta) -> None:
        self._whole, self._then = whole, then

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """As `Delta.rows`."""
        return self._then.rows(self._whole.rows(base, start, stop), start, stop)


def _place(name: str) -> tuple[str, str]:
    """The base's tensor that a tensor of an adapter belongs to, and its part in it."""
    match = _PART.fullmatch(name)
    if not match:  # modules_to_save and trained biases: they replace the base's tensor
        return name.replace('.base_layer.', '.').replace('.modules_to_save.', '.'), 'whole'
    module, part = match['module'].removesuffix('.base_layer'), match['part']
    if match['bias']:
        return f'{module}.bias', 'bias'
    return f'{module}.weight', _PARTS[part]


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name from its end, as peft reads them."""
    for pattern, value in patterns.items():
        if re.match(rf'(.*\.)?({pattern})$', module):
            return value
    return default
