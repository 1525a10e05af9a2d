"""What only the plain kernels can show: the dropout mask's statistics."""

import pytest
import torch

from xtuner.kernels import reference


@pytest.mark.parametrize('p', [0.05, 0.1, 0.5])
def test_mask_drops_the_share_asked_for(p):
    keep = reference.dropout_keep(1000, 1000, p, torch.tensor(12345)).double()
    spread = (p * (1 - p) / 1e6) ** 0.5
    assert abs(float(keep.mean()) - (1 - p)) < 5 * spread
    row_spread = (p * (1 - p) / 1000) ** 0.5
    for means in (keep.mean(0), keep.mean(1)):
        assert float((means - (1 - p)).abs().max()) < 5 * row_spread
        assert 0.8 < float(means.std()) / row_spread < 1.2


def test_masks_of_other_seeds_and_neighbours_are_independent():
    masks = [reference.dropout_keep(1000, 1000, 0.5, torch.tensor(seed)).double() - 0.5 for seed in (7, 8, 9000)]
    pairs = [(masks[0], masks[1]), (masks[1], masks[2]), (masks[0][:, 1:], masks[0][:, :-1])]
    pairs += [(masks[0][1:], masks[0][:-1])]
    for one, other in pairs:
        assert abs(float((one * other).mean()) / 0.25) < 5e-3


def test_no_dropout_keeps_all():
    assert reference.dropout_keep(10, 10, 0.0, torch.tensor(3)).all()
