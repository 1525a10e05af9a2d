"""What training takes for granted of a model, tried on the loaded one with a few tokens.

That its logits are its head's, by a rule that is known; and that it tells the samples of a pack apart by positions that
begin anew, as docs/data.md draws it. Families differ in both, and a wrong loss would look like any other.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import ConfigError
from xtuner.fused.enable import reads_host_positions
from xtuner.model.logits import LogitRule
from xtuner.objectives.sft import SupervisedFinetune

logger = logging.getLogger('xtuner')

_OWN_LOGITS = (
    'the logits of a model of type {kind!r} are not its output head times the last states: the loss takes its own '
    'forward pass, which holds all logits at once'
)
_LONGEST = (
    'a model of type {kind!r} turns all samples of a pack by the length of its longest: one of more than {original} '
    'tokens changes the others; dataset.max_length={original} or dataset.packing=none avoids that'
)
_KNOWN = ('internlm', 'internlm2', 'internlm3', 'llama')  # proven by tests
_LENGTH = 16  # tokens of a sample
_ROUNDING = 1e-4  # relative: logits by a known rule differ by far less, those by another rule by more
_NOISE = 10.0  # of what other tokens of the batch may change in a sample: experts are multiplied in other sizes


def check_family(model: SupervisedFinetune, *, packed: bool, max_length: int) -> None:
    """Tries a model before its first step; where ranks hold its weights together, all call it.

    Args:
        model: Loaded and prepared for training; takes its own logits from now on where its rule is not known.
        packed: Whether samples share rows.
        max_length: Tokens of a row.

    Raises:
        ConfigError: samples of a pack see each other.
    """
    causal, training = model.base, model.training
    kind, dtype = causal.config.model_type, causal.dtype
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(causal.device.type, dtype, enabled=dtype != torch.float32):
            if kind not in _KNOWN and not _follows(causal, model.rule):
                model.rule = None
                logger.warning('%s', _OWN_LOGITS.format(kind=kind))
            known = kind in _KNOWN or reads_host_positions(causal.get_decoder())
            if packed and not known and _samples_see_each_other(causal):
                raise ConfigError(
                    f'`dataset.packing`: in a model of type {kind!r} the samples of a pack see each other, so that it '
                    'would learn from other conversations; set dataset.packing=none'
                )
    finally:
        model.train(training)
    original = _trained_length(causal.config)
    if packed and original and max_length > original:
        logger.warning('%s', _LONGEST.format(kind=kind, original=original))


def _follows(causal: Any, rule: LogitRule | None) -> bool:
    """Whether a model's logits are those of its head by a rule."""
    decoder = causal.get_decoder()
    if rule is None or decoder is causal:
        return False
    ids, positions = _sample(causal, seed=0)[None], torch.arange(_LENGTH, device=causal.device)[None]
    own = causal(input_ids=ids, position_ids=positions, use_cache=False).logits
    hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    head = causal.get_output_embeddings()
    ours = rule.apply(head(hidden))
    return own.shape == ours.shape and _difference(own, ours) < _ROUNDING


def _samples_see_each_other(causal: Any) -> bool:
    """Whether the second of two samples in a row changes with the first one's tokens, beyond what another row does."""
    first, other, second = (_sample(causal, seed) for seed in range(3))
    apart = torch.arange(_LENGTH, device=causal.device)
    packed = [
        _states(causal, torch.cat([one, second])[None], apart.repeat(2)[None])[0, _LENGTH:] for one in (first, other)
    ]
    in_rows = [_states(causal, torch.stack([one, second]), apart.expand(2, -1))[1] for one in (first, other)]
    return _difference(*packed) > _NOISE * _difference(*in_rows) + 1e-6


def _states(causal: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return causal.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)[0]


def _sample(causal: Any, seed: int) -> Tensor:
    """int64 (L,) of ordinary tokens: special ones come first in most vocabularies, and those of images last."""
    words = causal.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(words // 8, words // 2, (_LENGTH,), generator=torch.Generator().manual_seed(seed))
    return ids.to(causal.device)


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative to the first one's size."""
    one, other = one.double(), other.double()
    return ((one - other).norm() / one.norm().clamp_min(1e-30)).item()


def _trained_length(config: Any) -> int | None:
    """Tokens beyond which rotary angles change for a whole batch, where a model has two sets of them."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, 'rope_parameters', None) or getattr(text, 'rope_scaling', None) or {}
    if rope.get('rope_type', rope.get('type')) != 'longrope':
        return None
    original = rope.get('original_max_position_embeddings') or getattr(text, 'original_max_position_embeddings', None)
    return int(original) if original else None
