"""The fused values of target tokens against their definitions in float64, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xtuner.fused.loss import fused_linear_cross_entropy, target_rows
from xtuner.fused.target_values import VALUES, fused_target_values

TOKENS, WORDS, HIDDEN = 37, 101, 24
# Relative to the norm: float64 rounds 1e-16 a sum of 100 terms; float32 loses 3 digits more where a gradient is put
# together from two rows that nearly cancel; bfloat16 has 8 bits, and cancelling costs one more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.5e-2}
REQUESTS = [('log_prob',), ('log_sum_exp',), ('sum_log_probs',), ('entropy',), ('kl_to_base',),
            ('log_prob', 'log_sum_exp', 'sum_log_probs'), VALUES]  # fmt: skip


def problem(dtype: torch.dtype, *, bias: bool, trained: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(WORDS, HIDDEN, generator=generator) / 2).to(dtype).requires_grad_(trained)
    offset = torch.randn(WORDS, generator=generator).to(dtype).requires_grad_(trained) if bias else None
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    labels[::4] = -100
    base = torch.randn(len(target_rows(labels)), HIDDEN, generator=generator).to(dtype)
    return {'hidden': hidden, 'weight': weight, 'offset': offset, 'labels': labels, 'base': base}


def definitions(problem: dict[str, Any], cap: float | None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every value by its formula from all logits in float64, and the tensors that gradients are by."""
    hidden, weight, offset = (
        None if problem[name] is None else problem[name].detach().double().requires_grad_(problem[name].requires_grad)
        for name in ('hidden', 'weight', 'offset')
    )
    targets = problem['labels'][target_rows(problem['labels'])]

    def logits(states: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        plain = torch.nn.functional.linear(states, weight, offset)
        return plain if cap is None else cap * torch.tanh(plain / cap)

    z = logits(hidden[target_rows(problem['labels'])], weight, offset)
    p, row = torch.softmax(z, -1), torch.arange(len(targets))
    q = torch.softmax(
        logits(problem['base'].double(), weight.detach(), None if offset is None else offset.detach()), -1
    )
    found = {
        'log_prob': p.log()[row, targets], 'log_sum_exp': z.exp().sum(-1).log(), 'entropy': -(p * p.log()).sum(-1),
        'sum_log_probs': p.log().sum(-1), 'kl_to_base': (p * (p / q).log()).sum(-1),
        'base_log_prob': q.log()[row, targets],
    }  # fmt: skip
    return found, [t for t in (hidden, weight, offset) if t is not None and t.requires_grad]


def difference(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('trained', [False, True])
@pytest.mark.parametrize(('cap', 'bias', 'slice_tokens'), [(None, True, None), (None, False, 5), (3.0, True, 5)])
@pytest.mark.parametrize('values', REQUESTS, ids='-'.join)
def test_values_and_all_gradients(
    values: tuple[str, ...],
    cap: float | None,
    bias: bool,
    slice_tokens: int | None,
    trained: bool,
    dtype: torch.dtype,
) -> None:
    given = problem(dtype, bias=bias, trained=trained)
    exact, by = definitions(given, cap)
    base = given['base'] if {'kl_to_base', 'base_log_prob'} & set(values) else None
    ours = fused_target_values(given['hidden'], given['weight'], given['offset'], given['labels'], values,
                               base_hidden_TH=base, slice_tokens=slice_tokens, cap=cap)  # fmt: skip
    factors = torch.rand(len(values), len(ours[values[0]]), generator=torch.Generator().manual_seed(2)) - 0.5
    for name in values:
        assert difference(ours[name].detach(), exact[name].detach()) < TOLERANCE[dtype]
        assert ours[name].dtype == (dtype if dtype == torch.float64 else torch.float32)
    sum((ours[name] * factor).sum() for name, factor in zip(values, factors, strict=True)).backward()
    gradients = torch.autograd.grad(
        sum((exact[name] * factor).sum() for name, factor in zip(values, factors.double(), strict=True)), by
    )
    mine = [given[name].grad for name in ('hidden', 'weight', 'offset') if given[name] is not None and
            given[name].requires_grad]  # fmt: skip
    for gradient, expected in zip(mine, gradients, strict=True):
        assert difference(gradient, expected) < TOLERANCE[dtype]
    assert not given['hidden'].grad[::4].any()


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the results of products that are made from now on."""
    from xtuner.fused import target_values

    made: list[tuple[int, ...]] = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            made.append(tuple(result.shape))
            return result

        return call

    for name in ('product', 'sum_of_products'):
        monkeypatch.setattr(target_values, name, counted(getattr(target_values, name)))
    return made


@pytest.mark.parametrize(
    ('values', 'no_grad', 'trained', 'cap', 'products'),
    [
        (('log_prob',), (), False, None, 2),  # as the fused cross entropy: logits, and the gradient by hidden states
        (('log_prob',), (), False, 3.0, 2),
        (('log_prob', 'sum_log_probs', 'log_sum_exp'), (), False, None, 2),
        (('log_prob', 'entropy'), ('entropy',), False, None, 2),
        (('log_prob', 'sum_log_probs'), (), False, 3.0, 3),  # the logits again
        (('log_prob', 'entropy'), (), False, None, 3),
        (('log_prob',), (), True, None, 4),  # the logits again, and the gradient by the head
        (VALUES, (), True, None, 6),  # the base's logits, twice
        (('log_prob',), ('log_prob',), False, None, 1),
    ],
)
def test_the_products_are_those_of_the_docs(
    values: tuple[str, ...],
    no_grad: tuple[str, ...],
    trained: bool,
    cap: float | None,
    products: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(torch.float32, bias=False, trained=trained)
    made = count_products(monkeypatch)
    base = given['base'] if 'kl_to_base' in values else None
    found = fused_target_values(given['hidden'], given['weight'], None, given['labels'], values, no_grad=no_grad,
                                base_hidden_TH=base, cap=cap)  # fmt: skip
    total = sum(value.sum() for value in found.values())
    if total.requires_grad:
        total.backward()
    assert len(made) == products
    assert [name for name in values if not found[name].requires_grad] == [
        name for name in values if name in (*no_grad, 'base_log_prob')
    ]


def test_the_log_probabilities_sum_to_the_cross_entropy() -> None:
    given, twin = (problem(torch.float32, bias=True, trained=False) for _ in range(2))
    values = fused_target_values(given['hidden'], given['weight'], given['offset'], given['labels'], ['log_prob'])
    loss = fused_linear_cross_entropy(twin['hidden'], twin['weight'], twin['offset'], twin['labels'])
    assert -values['log_prob'].sum().item() == pytest.approx(loss.item(), rel=1e-6)
    values['log_prob'].sum().neg().backward()
    loss.backward()
    assert difference(given['hidden'].grad, twin['hidden'].grad.double()) < 1e-6


def test_without_a_target_there_are_no_values_and_zero_gradients() -> None:
    for trained in (False, True):
        given = problem(torch.float32, bias=False, trained=trained)
        found = fused_target_values(given['hidden'], given['weight'], None, torch.full((TOKENS,), -100), VALUES[:4])
        total = sum(value.sum() for value in found.values())
        total.backward()
        assert total.item() == 0
        assert not given['hidden'].grad.any()
        assert not trained or not given['weight'].grad.any()


def test_a_word_of_probability_zero_counts_nothing() -> None:
    """A model may give padding of its vocabulary -inf, which times 0 would be NaN."""
    from xtuner.kernels import reference_softmax as reference

    logits = torch.randn(3, 11)
    logits[:, 4] = -torch.inf
    targets = torch.tensor([0, 1, 2])
    sums = reference.softmax_sums(logits, targets, logits.clone())
    kept = torch.cat([logits[:, :4], logits[:, 5:]], 1)
    exact = reference.softmax_sums(kept, targets, kept.clone())
    assert torch.allclose(sums[[0, 1, 2, 4]], exact[[0, 1, 2, 4]], atol=1e-6)  # the sum of log p is -inf, as it must be
    factors = torch.ones(5, 3)
    factors[1] = 0
    reference.softmax_gradient_(logits, targets, sums, factors, logits.clone())
    assert logits.isfinite().all()
    assert not logits[:, 4].any()
