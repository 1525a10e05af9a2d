"""oneDNN's products beside float64."""

from __future__ import annotations

import pytest
import torch

from xtuner.model.kernels import onednn

pytestmark = pytest.mark.skipif(not onednn.can_lay_out(torch.empty(256, 256)), reason='no oneDNN for this processor')


@pytest.mark.parametrize('rows', [(1,), (16,), (2, 3), (300,), (0,)])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('laid_out', [False, True])
@torch.inference_mode()
def test_the_product(rows: tuple[int, ...], bias: bool, laid_out: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, more = (torch.randn(*shape, generator=generator) for shape in ((*rows, 200), (310, 200), (310,)))
    used = onednn.lay_out(weight) if laid_out else weight
    got = onednn.linear(x, used, more if bias else None)
    want = x.double() @ weight.double().t() + (more.double() if bias else 0)
    # Float32 sums of 200 products of order 1.
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_few_numbers_of_rows() -> None:
    """Code is compiled for each."""
    usual = [onednn._usual_number(rows) for rows in range(513)]
    assert sorted(set(usual)) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(rows <= size and (rows < 2 or size < 2 * rows) for rows, size in enumerate(usual))


def test_what_is_not_laid_out() -> None:
    assert not onednn.can_lay_out(torch.empty(256, 256, dtype=torch.bfloat16))
    assert not onednn.can_lay_out(torch.empty(64, 64)), 'too small to be worth it'
    assert not onednn.can_lay_out(torch.empty(256, 256, device='meta'))
