"""Samples of a pack do not see each other, on the attention routines that only a GPU has."""

from __future__ import annotations

import pytest
import torch

from tests.parity import isolation_on_gpu as checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize('shape', [{}, {'key_heads': 2}, {'size': 64}], ids=['128', 'grouped', '64'])
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('routine', ['ours', 'torch'])
def test_variable_length_attention_is_that_of_the_samples_alone(routine: str, dtype: torch.dtype, shape: dict) -> None:
    checks.check_routine(routine, dtype, **shape)


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('routine', ['ours', 'torch'])
def test_a_changed_sample_changes_no_bit_of_another(routine: str, dtype: torch.dtype) -> None:
    checks.check_nothing_leaks(routine, dtype)


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_a_model_trains_a_pack_as_its_samples(attention: str, dtype: torch.dtype) -> None:
    checks.check_model(attention, dtype)


@pytest.mark.parametrize('dtype', HALF)
def test_the_fused_path_trains_a_pack_as_its_samples(dtype: torch.dtype) -> None:
    checks.check_model('sdpa', dtype, fast=True)


@pytest.mark.skipif(not checks.has_flash_attention_2(), reason='needs the package flash-attn')
@pytest.mark.parametrize('dtype', HALF)
def test_flash_attention_2_trains_a_pack_as_its_samples(dtype: torch.dtype) -> None:
    checks.check_model('flash_attention_2', dtype)
