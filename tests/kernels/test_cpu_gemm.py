"""oneDNN's products beside float64."""

from __future__ import annotations

import pytest
import torch

from xtuner.kernels import cpu_gemm

pytestmark = pytest.mark.skipif(not cpu_gemm.can_pack(torch.empty(256, 256)), reason='no oneDNN for this processor')


@pytest.mark.parametrize('rows', [(1,), (16,), (2, 3), (300,), (0,)])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('laid_out', [False, True])
@torch.inference_mode()
def test_the_product(rows: tuple[int, ...], bias: bool, laid_out: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, more = (torch.randn(*shape, generator=generator) for shape in ((*rows, 200), (310, 200), (310,)))
    used = cpu_gemm.pack_weight(weight) if laid_out else weight
    got = cpu_gemm.linear(x, used, more if bias else None)
    want = x.double() @ weight.double().t() + (more.double() if bias else 0)
    # Float32 sums of 200 products of order 1.
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_few_numbers_of_rows() -> None:
    """Code is compiled for each."""
    usual = [cpu_gemm._padded_rows(rows) for rows in range(513)]
    assert sorted(set(usual)) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(rows <= size and (rows < 2 or size < 2 * rows) for rows, size in enumerate(usual))
    for rows in range(513, 5000):  # what is added is computed
        assert rows <= cpu_gemm._padded_rows(rows) <= 1.25 * rows
    assert len({cpu_gemm._padded_rows(rows) for rows in range(513, 4097)}) == 12


def test_what_is_not_laid_out() -> None:
    assert not cpu_gemm.can_pack(torch.empty(256, 256, dtype=torch.bfloat16))
    assert not cpu_gemm.can_pack(torch.empty(64, 64)), 'too small to be worth it'
    assert not cpu_gemm.can_pack(torch.empty(256, 256, device='meta'))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every float32 product goes to oneDNN, and is counted."""
    calls: list[int] = []
    linear = cpu_gemm.linear
    monkeypatch.setattr(cpu_gemm, '_MIN_MULTIPLICATIONS', 1)
    monkeypatch.setattr(cpu_gemm, 'linear', lambda *args: calls.append(1) or linear(*args))
    return calls


def views(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Matrices of one shape in every layout that the layers hand over."""
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, 3 * columns, generator=generator)
    tall = torch.randn(columns, 3 * rows, generator=generator)
    return {
        'dense': wide[:, :columns].contiguous(),
        'columns of a wider one': wide[:, columns : 2 * columns],
        'transposed': tall[:, :rows].contiguous().t(),
        'transposed columns': tall[:, rows : 2 * rows].t(),
    }


LAYOUTS = list(views(1, 1))


@pytest.mark.parametrize('shape', [(37, 130, 9), (9, 37, 130), (1, 5, 1)])
@pytest.mark.parametrize('left', LAYOUTS)
@pytest.mark.parametrize('right', LAYOUTS)
def test_products_in_every_layout(shape: tuple[int, int, int], left: str, right: str, always: list[int]) -> None:
    x, y = views(*shape[:2])[left], views(*shape[1:])[right]
    bias, out = torch.arange(shape[2]).float(), torch.zeros(shape[0], 2 * shape[2])[:, ::2]
    want = x.double() @ y.double()
    close = {'atol': 1e-4, 'rtol': 1e-4}  # float32 sums of up to 130 products of order 1
    torch.testing.assert_close(cpu_gemm.product(x, y).double(), want, **close)
    torch.testing.assert_close(cpu_gemm.product(x, y, bias).double(), want + bias, **close)
    torch.testing.assert_close(cpu_gemm.product(x, y, out=out).double(), want, **close)
    torch.testing.assert_close(cpu_gemm.add_product_(out, x, y).double(), 2 * want, **close)
    other = views(shape[0], 7)[right]
    got = cpu_gemm.sum_of_products(x, other).double()
    torch.testing.assert_close(got, x.double().t() @ other.double(), **close)
    assert len(always) == 5


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes_go_elsewhere(dtype: torch.dtype, always: list[int]) -> None:
    x, y = torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
    assert torch.equal(cpu_gemm.product(x, y), torch.full((64, 64), 64, dtype=dtype))
    assert not always


def test_small_products_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, 'linear', None)
    assert cpu_gemm.product(torch.ones(8, 256), torch.ones(256, 256)).eq(256).all()


def test_sums_over_rows_see_few_numbers_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, linear = set(), cpu_gemm.linear
    monkeypatch.setattr(cpu_gemm, 'linear', lambda x, *others: seen.add(x.shape[1]) or linear(x, *others))
    for rows in range(33, 65, 5):
        sums = cpu_gemm.sum_of_products(torch.ones(rows, 64), torch.ones(rows, 512))
        assert torch.equal(sums, torch.full((64, 512), float(rows)))
    assert seen == {48, 64}


def test_a_factor_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values would be right, but came after 1000 times as long."""
    factors, linear = [], cpu_gemm.linear
    monkeypatch.setattr(cpu_gemm, 'linear', lambda x, weight, bias: factors.append(weight) or linear(x, weight, bias))
    for right in views(64, 512).values():
        cpu_gemm.product(torch.ones(64, 64), right)
        cpu_gemm.sum_of_products(torch.ones(64, 64), right)
    assert len(factors) == 8 and all(f.is_contiguous() or f.t().is_contiguous() for f in factors)
