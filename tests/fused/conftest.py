"""A packed batch, and a 4-bit model with an adapter, for the fused path."""

import pytest
import torch

from tests.tiny_models import DEVICE, quantise, tiny_llama, with_adapter


@pytest.fixture
def batch():
    """Two rows of 17 tokens; the first row is a pack of three samples."""
    ids = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    positions = torch.stack((torch.cat((torch.arange(5), torch.arange(9), torch.arange(3))), torch.arange(17)))
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[positions == 0] = -100
    return {k: v.to(DEVICE) for k, v in (('input_ids', ids), ('position_ids', positions), ('labels', labels))}


@pytest.fixture
def model():
    return with_adapter(quantise(tiny_llama()))
