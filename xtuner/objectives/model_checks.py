"""Trials of a loaded model with a few tokens, before its first step: what training assumes of every model.

- Its logits follow from its last hidden states by a known rule (`xtuner.model.logits`). Otherwise the loss takes the
  model's own forward pass, which holds all logits at once. Logits are scaled up, in float32, so that caps act.
- It counts positions 0, 1, 2, ..., and no token depends on later ones. Otherwise it is refused.
- In a pack, where positions start again with each sample, a sample gives what it gives at another place behind other
  samples. Windows and chunks shorter than a pack are made shorter than the trial's samples meanwhile. Otherwise packing
  is refused; models that are known to mix samples had it switched off before (`xtuner.model.families.packing`).

Letters of shapes: L tokens of a sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import ConfigError, ModelError, one_line
from xtuner.fused.enable import reads_host_positions
from xtuner.model.families.find import spec_of
from xtuner.model.families.packing import rope_trained_length
from xtuner.model.logits import LogitRule
from xtuner.objectives.model import TrainingModel

logger = logging.getLogger('xtuner')

_OWN_LOGITS = (
    'the logits of a model of type {kind!r} do not follow from its output head and last hidden states by a known rule '
    '({detail}): the loss takes its own forward pass, which holds all logits at once'
)
_LONGEST = (
    'a model of type {kind!r} turns all samples of a pack by the length of its longest: one of more than {original} '
    'tokens changes the others; dataset.max_length={original} or dataset.packing=none avoids that'
)
_UNTRAINABLE = {'reformer': 'it trains only on rows of exactly as many tokens as its `axial_pos_shape` multiplies to'}
_LENGTH = 16  # tokens of a sample
_SHORT = 4  # tokens of a window or a chunk in a trial
_WINDOWS = ('sliding_window', 'attention_chunk_size')  # config fields from which each forward pass makes its masks
_LARGE = 60.0  # to which the largest logit is scaled: published caps are 15 to 50
_OTHER_LENGTH = 0.3  # of a sample's states may change where the row is longer: other kernels, other experts
_NOISE = 10.0  # times what other shapes of a batch change in a sample: experts are multiplied in other sizes


def check_family(model: TrainingModel, *, packed: bool, max_length: int) -> None:
    """Tries a model before its first step; where ranks hold its weights together, all call it.

    Args:
        model: Loaded and prepared for training; takes its own logits from now on where its rule is not known.
        packed: Whether samples share rows.
        max_length: Tokens of a row.

    Raises:
        ConfigError: samples of a pack do not give what they give alone.
        ModelError: a token depends on later ones, or positions are not counted from 0.
    """
    causal, training = model.base, model.training
    kind, dtype = causal.config.model_type, causal.dtype
    spec = spec_of(causal.config)
    described = spec.mismatch(causal.get_decoder()) is None  # and so proven by the family's own tests
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(causal.device.type, dtype, enabled=dtype != torch.float32):
            if not described:
                _check_loss(model)
            if packed and not (described and spec.isolates_packs) and not reads_host_positions(causal.get_decoder()):
                _check_packs(model, max_length)
    finally:
        model.train(training)
    original = rope_trained_length(causal.config)
    if packed and original and max_length > original:
        logger.warning('%s', _LONGEST.format(kind=kind, original=original))


def _check_loss(model: TrainingModel) -> None:
    """Leaves the rule where it gives the model's own logits; refuses a model that cannot be trained by either."""
    causal, kind = model.base, model.base.config.model_type
    if kind in _UNTRAINABLE:
        raise ModelError(f'a model of type {kind!r} cannot be trained here: {_UNTRAINABLE[kind]}')
    if model.rule is not None and (detail := _difference_of_logits(model, model.rule)):
        model.rule = None
        ids = _sample(causal, seed=0)[None]
        own = causal(input_ids=ids, use_cache=False).logits
        if _difference(own, _outputs(model, ids, _positions(causal, _LENGTH))) > _rounding(causal.dtype):
            raise ModelError(
                f'a model of type {kind!r} does not count the positions of a text 0, 1, 2, ..., so its loss would not '
                'be its own; it cannot be trained here'
            )
        logger.warning('%s', _OWN_LOGITS.format(kind=kind, detail=detail))
    if _depends_on_later_tokens(model):
        remedy = ', unless "is_decoder": true in its config.json' if hasattr(causal.config, 'is_decoder') else ''
        raise ModelError(
            f'in a model of type {kind!r} a token depends on later ones or on how many follow, which are not there yet '
            f'when it generates; it cannot be trained to continue texts{remedy}'
        )


def _difference_of_logits(model: TrainingModel, rule: LogitRule) -> str:
    """How the rule's logits, (1, L, V) float32 and large, differ from the model's own, in a few words; '' where not."""
    causal = model.base
    decoder = causal.get_decoder()
    if decoder is causal:
        return 'its decoder cannot be called by itself'
    head, ids = causal.get_output_embeddings(), _sample(causal, seed=0)[None]
    try:
        hidden = decoder(input_ids=ids, position_ids=_positions(causal, _LENGTH), use_cache=False).last_hidden_state
        ours = head(hidden).float()
    except (AttributeError, RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return one_line(error)
    factor = _LARGE / ours.abs().max().item()
    with _scaled(head, factor) as calls:
        own = causal(input_ids=ids, use_cache=False).logits
    if not calls:
        return 'its output head is not called as a module'
    ours = rule.apply(ours * factor)
    if own.shape != ours.shape:
        return f'{own.shape[-1]} words, not {ours.shape[-1]}'
    difference = _difference(own, ours)
    return '' if difference < _rounding(causal.dtype) else f'relative difference {difference:.1e}'


@contextmanager
def _scaled(head: Any, factor: float) -> Iterator[list[None]]:
    """Multiplies a head's output, in float32; yields a list that grows by an entry each time the head is called."""
    calls: list[None] = []

    def scale(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        calls.append(None)
        return logits.float() * factor

    handle = head.register_forward_hook(scale)
    try:
        yield calls
    finally:
        handle.remove()


def _depends_on_later_tokens(model: TrainingModel) -> bool:
    """Whether a sample changes with the tokens that follow, or with their number, by more than rounding."""
    first, one, other = (_sample(model.base, seed) for seed in range(3))
    positions = _positions(model.base, 2 * _LENGTH)
    alone = _outputs(model, first[None], positions[:, :_LENGTH])[0]
    texts = [_outputs(model, torch.cat([first, rest])[None], positions)[0, :_LENGTH] for rest in (one, other)]
    if _exceeds(_difference(*texts), lambda: _noise_of_rows(model), 1e-6):
        return True
    return _difference(alone, texts[0]) > (1e-4 if model.base.dtype == torch.float32 else _OTHER_LENGTH)


def _check_packs(model: TrainingModel, max_length: int) -> None:
    """Raises ConfigError where a sample gives something else in another pack."""
    kind = model.base.config.model_type
    if _samples_see_each_other(model):
        raise ConfigError(
            f'`dataset.packing`: in a model of type {kind!r} the samples of a pack see each other, so that it '
            'would learn from other conversations; set dataset.packing=none'
        )
    with _short_windows(model.base.config, max_length) as fields:
        if fields and _depends_on_place(model):
            names = ', '.join(f'`{name}` ({value})' for name, value in fields.items())
            raise ConfigError(
                f'`dataset.packing`: in a model of type {kind!r} a sample of a pack gives something else than alone '
                f'where packs are longer than {names}; set dataset.max_length to that, or dataset.packing=none'
            )


def _samples_see_each_other(model: TrainingModel) -> bool:
    """Whether the second of two samples in a row changes with the first one's tokens, beyond what another row does."""
    first, other, second = (_sample(model.base, seed) for seed in range(3))
    positions = _positions(model.base, _LENGTH).repeat(1, 2)
    packs = [_outputs(model, torch.cat([one, second])[None], positions)[0, _LENGTH:] for one in (first, other)]
    return _exceeds(_difference(*packs), lambda: _noise_of_rows(model), 1e-6)


def _depends_on_place(model: TrainingModel) -> bool:
    """Whether a sample changes where it begins elsewhere in a row, by more than in a longer row."""
    first, other, sample = (_sample(model.base, seed) for seed in range(3))
    whole = _positions(model.base, _LENGTH)

    def in_pack(*lengths: int) -> Tensor:
        """The sample's outputs behind so many tokens of the first one, and before so many of the other."""
        before, after = lengths
        ids = torch.cat([first[:before], sample, other[:after]])[None]
        positions = torch.cat([whole[:, :before], whole, whole[:, :after]], dim=1)
        return _outputs(model, ids, positions)[0, before : before + _LENGTH]

    alone = in_pack(0, 0)
    # In half precision another order of sums changes about a hundredth, so that smaller effects are not seen.
    floor = 1e-5 if model.base.dtype == torch.float32 else 1e-2
    # One token more is not a multiple of the window, so that chunks counted from the row's start end elsewhere.
    return _exceeds(_difference(alone, in_pack(_SHORT + 1, 0)), lambda: _difference(alone, in_pack(0, _LENGTH)), floor)


@contextmanager
def _short_windows(config: Any, max_length: int) -> Iterator[dict[str, int]]:
    """Shortens the windows that a pack would exceed; yields the fields with their own values."""
    text = config.get_text_config(decoder=True)
    fields = {name: vars(text).get(name) for name in _WINDOWS}
    shortened = {name: value for name, value in fields.items() if isinstance(value, int) and 0 < value < max_length}
    try:
        for name, value in shortened.items():
            setattr(text, name, min(value, _SHORT))
        yield shortened
    finally:
        for name, value in shortened.items():
            setattr(text, name, value)


def _exceeds(difference: float, noise: Callable[[], float], floor: float) -> bool:
    """Whether a difference is more than rounding; what rounding does is measured only where there is one."""
    return difference > floor and difference > _NOISE * noise() + floor


def _noise_of_rows(model: TrainingModel) -> float:
    """What another row of the same batch changes in a row."""
    first, other, second = (_sample(model.base, seed) for seed in range(3))
    positions = _positions(model.base, _LENGTH).expand(2, -1)
    return _difference(*(_outputs(model, torch.stack([one, second]), positions)[1] for one in (first, other)))


def _outputs(model: TrainingModel, ids: Tensor, positions: Tensor) -> Tensor:
    """What the loss is computed from: last hidden states, or the model's own logits where its rule is not known."""
    whole = model.base if model.rule is None else model.base.get_decoder()
    output = whole(input_ids=ids, position_ids=positions, use_cache=False)
    return output.logits if model.rule is None else output.last_hidden_state


def _positions(causal: Any, length: int) -> Tensor:
    return torch.arange(length, device=causal.device)[None]


def _sample(causal: Any, seed: int) -> Tensor:
    """int64 (L,) of ordinary tokens: special ones come first in most vocabularies, and those of images last."""
    words = causal.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(words // 8, words // 2, (_LENGTH,), generator=torch.Generator().manual_seed(seed))
    return ids.to(causal.device)


def _rounding(dtype: torch.dtype) -> float:
    """Relative difference of logits by one rule: some models round them to their own dtype before the cap."""
    return 1e-4 if dtype == torch.float32 else 1e-2


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative to the first one's size."""
    one, other = one.double(), other.double()
    return ((one - other).norm() / one.norm().clamp_min(1e-30)).item()
