"""What is said of the base that an adapter runs on, and of the one that a merged model was merged on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xtuner.adapters.attach import Provenance
from xtuner.adapters.trained_base import base_note, merged_note

NF4 = {'bits': 4, 'quant_type': 'nf4', 'double_quant': True}
TRAINED = Provenance('base', '0' * 64, 'internlm_chat', 'bf16', NF4)


@pytest.mark.parametrize(('here', 'said'), [
    (NF4, ''), ({'bits': 4}, ''), (None, 'the base is unquantized, but the adapter was trained with it in 4 bit (nf4)'),
    ({'bits': 8}, 'the base is in 8 bit, but'), (NF4 | {'quant_type': 'fp4'}, 'the base is in 4 bit (fp4), but'),
])  # fmt: skip
def test_another_base_than_the_trained_one_is_named(here: Any, said: str) -> None:
    assert base_note(TRAINED, here).startswith(said)
    assert bool(base_note(TRAINED, here)) == bool(said)
    assert not base_note(None, here)


def test_an_unquantised_adapter_on_a_quantised_base() -> None:
    assert 'is in 4 bit (nf4), but the adapter was trained with it unquantized' in base_note(
        replace(TRAINED, quantization=None), NF4
    )


def test_what_a_merge_measured() -> None:
    merged = {'base': 'dequantized', 'agreement': 0.995, 'kl': 4.5e-5, 'positions': 200}
    assert merged_note(replace(TRAINED, merged=merged)) == (
        'merged into the values used in training; compared with the base in 4 bit (nf4) plus adapter, as trained: same '
        'likeliest token at 99.5 % of 200 positions, KL 4.5e-05'
    )
    assert merged_note(TRAINED) == ''
    for broken in ({'base': 'original'}, merged | {'kl': 'x'}, {}):
        assert merged_note(replace(TRAINED, merged=broken)).startswith('merged into the ')
