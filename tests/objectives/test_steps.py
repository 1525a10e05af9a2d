"""A step of any objective does not depend on how its items are spread over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.distributed.ranks import Case, alone, run_ranks
from tests.engine.distributed.test_strategies import TOLERANCE, furthest
from tests.engine.test_loop import make_items, make_model, make_runner, metrics
from tests.objectives.toys import PLAIN, Anchored, Rewritten, Sample, Smoothed, Standardised
from xtuner.dataset.packing.collate import collate
from xtuner.engine.hooks import ValidateHook
from xtuner.engine.step.result import RESERVED
from xtuner.errors import TrainingError
from xtuner.objectives.base import Objective
from xtuner.objectives.model import TrainingModel

NUM_ITEMS = 8


def with_objective(objective: Objective, *, dropout: float = 0.0) -> TrainingModel:
    return TrainingModel(make_model(dropout=dropout).llm, objective)


def one_step(folder: Path, objective: Objective, **schedule: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The first line of `metrics.jsonl`, and the gradient."""
    model: Any = with_objective(objective)
    runner = make_runner(folder, make_items(NUM_ITEMS), model, max_steps=1, max_norm=None, **schedule)
    gradient: dict[str, torch.Tensor] = {}
    runner.optim_wrapper.optimizer.register_step_pre_hook(
        lambda *_: gradient.update({n: p.grad.clone() for n, p in model.llm.named_parameters()})
    )
    runner.train()
    return metrics(folder)[0], gradient


def by_definition(kind: type[Objective]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient in float64, sample by sample with plain transformers."""
    llm, samples, targets = make_model().double().llm, [], 0
    for item in make_items(NUM_ITEMS):
        ids, labels = torch.tensor(item['input_ids']), torch.tensor(item['labels'])[1:]
        logits = llm(ids[None]).logits[0, :-1][labels != -100]
        samples.append(Sample(logits, logits.detach(), labels[labels != -100]))
        targets += len(samples[-1].targets)
    loss = PLAIN[kind](samples) / targets
    loss.backward()
    return loss.item(), {n: p.grad for n, p in llm.named_parameters()}


@pytest.mark.parametrize('kind', [Rewritten, Smoothed, Standardised])
def test_a_step_is_one_big_batch_by_definition(tmp_path: Path, kind: type[Objective]) -> None:
    loss, gradient = by_definition(kind)
    for batch_size, accumulated in ((8, 1), (2, 4), (1, 8)):
        line, ours = one_step(tmp_path / str(batch_size), kind(), batch_size=batch_size,
                              accumulative_counts=accumulated)  # fmt: skip
        assert line['loss'] == pytest.approx(loss, rel=1e-5)
        assert furthest(ours, gradient) < 5e-5  # float32 against float64; the weights of `Standardised` differ as well


def test_statistics_reach_the_loss_as_sums_over_the_step(tmp_path: Path) -> None:
    seen = []

    class Counting(Standardised):
        def loss(self, rows: Any, statistics: Any) -> Any:
            seen.append(statistics['count'].item())
            return super().loss(rows, statistics)

    line, _ = one_step(tmp_path, Counting(), batch_size=1, accumulative_counts=NUM_ITEMS)
    assert seen == [line['num_targets']] * NUM_ITEMS


def test_statistics_have_the_dropout_masks_of_the_loss(tmp_path: Path) -> None:
    first, second = [], []

    class Twice(Rewritten):
        def statistics(self, rows: Any) -> Any:
            first.append(rows.log_prob)
            return {}

        def loss(self, rows: Any, statistics: Any) -> Any:
            second.append(rows.log_prob.detach())
            return super().loss(rows, statistics)

    model: Any = with_objective(Twice(), dropout=0.5)
    make_runner(tmp_path, make_items(6), model, max_steps=2, batch_size=1, accumulative_counts=3).train()
    assert len(first) == 6
    # The loss sees a step's micro-batches after the statistics have seen them all.
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(first[:3], first[3:], strict=True))


def test_the_step_is_divided_by_the_weight(tmp_path: Path) -> None:
    class Rows(Rewritten):
        def weight(self, batch: Any) -> float:
            return 0.5 * len(batch['labels'])

    line, gradient = one_step(tmp_path / 'rows', Rows(), batch_size=2, accumulative_counts=4)
    usual, expected = one_step(tmp_path / 'usual', Rewritten(), batch_size=2, accumulative_counts=4)
    factor = usual['num_targets'] / (0.5 * NUM_ITEMS)
    assert line['loss'] == pytest.approx(usual['loss'] * factor, rel=1e-6)
    assert line['correct'] == pytest.approx(usual['correct'] * factor)
    assert furthest(gradient, {name: value * factor for name, value in expected.items()}) < 1e-5


@pytest.mark.parametrize('weight', [0.0, -1.0, float('nan'), float('inf')])
def test_a_weight_that_nothing_can_be_divided_by_is_refused(tmp_path: Path, weight: float) -> None:
    class Weightless(Rewritten):
        def weight(self, batch: Any) -> float:
            return weight

    with pytest.raises(TrainingError, match='step 1: objective Weightless gave the step the weight'):
        one_step(tmp_path, Weightless(), batch_size=1, accumulative_counts=2)


@pytest.mark.parametrize(
    ('weigh', 'message'),
    [
        (
            lambda batch: batch['positions'].sum(),
            r"objective Weighing failed in `weight`: KeyError: 'positions' \(.*test_steps.py:\d+\); the batch has "
            'input_ids, labels, position_ids$',
        ),
        (lambda batch: None, 'objective Weighing: `weight` returned nothing; return a number'),
        (
            lambda batch: batch['labels'] != -100,
            r'objective Weighing: `weight` must be one number, got shape \(1, \d+\)',
        ),
        (lambda batch: 'many', 'objective Weighing: `weight` must be one number, got str'),
    ],
)
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, weigh: Any, message: str) -> None:
    class Weighing(Rewritten):
        def weight(self, batch: Any) -> Any:
            return weigh(batch)

    with pytest.raises(TrainingError, match=message):
        one_step(tmp_path / 'training', Weighing(), batch_size=1)
    usual: Any = with_objective(Rewritten())
    runner = make_runner(tmp_path / 'validation', make_items(4), usual, max_steps=1, batch_size=4)
    with pytest.raises(TrainingError, match=message):
        ValidateHook(make_items(1), pad_id=0, batch_size=1, interval=1).evaluate(
            with_objective(Weighing()), runner.train_loop
        )


def test_metrics_are_logged_by_their_names(tmp_path: Path) -> None:
    line, _ = one_step(tmp_path, Rewritten(), batch_size=2, accumulative_counts=4)
    assert 0 <= line['correct'] <= 1
    assert set(line) - {'correct'} <= RESERVED


@pytest.mark.parametrize(
    ('named', 'words'),
    [
        (lambda call: {'loss': 1.0}, r"metrics named \['loss'\], as numbers that every step has; rename them"),
        (lambda call: {f'part {call}': 1.0}, r'names must be the same in every micro-batch'),
    ],
)
def test_metrics_with_other_names_are_refused(tmp_path: Path, named: Any, words: str) -> None:
    class Naming(Rewritten):
        calls = 0

        def loss(self, rows: Any, statistics: Any) -> Any:
            self.calls += 1
            return -rows.log_prob.sum(), named(self.calls)

    with pytest.raises(TrainingError, match=words):
        one_step(tmp_path, Naming(), batch_size=1, accumulative_counts=2)


def test_statistics_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    class Wrong(Rewritten):
        def statistics(self, rows: Any) -> Any:
            return {'count': str(rows.count)}

    with pytest.raises(TrainingError, match='objective Wrong: `statistics` must return tensors'):
        one_step(tmp_path, Wrong(), batch_size=1)


def test_validation_is_the_objective_s_loss_over_the_set(tmp_path: Path) -> None:
    """With statistics of the validation set, whatever its batches."""
    values = {}
    for batch_size in (1, 3, 6):
        model: Any = with_objective(Standardised())
        runner = make_runner(tmp_path / str(batch_size), make_items(4), model, max_steps=1, batch_size=4)
        hook = ValidateHook(make_items(6, seed=1), pad_id=0, batch_size=batch_size, interval=1)
        values[batch_size] = hook.evaluate(model, runner.train_loop)
        assert model.training
    assert values[1] == pytest.approx(values[6], rel=1e-5)
    assert values[3] == pytest.approx(values[6], rel=1e-5)
    with torch.no_grad():
        model.eval()
        batch = collate(make_items(6, seed=1), pad_id=0)
        statistics = model(**batch, only_statistics=True)
        expected = model(**batch, statistics=statistics) / statistics['count']
    assert values[6] == pytest.approx(expected.item(), rel=1e-5)


CASES = [
    *(Case(strategy, method, objective=kind) for strategy in ('ddp', 'fsdp') for method in ('lora', 'full')
      for kind in (Smoothed, Standardised)),
    Case('fsdp', 'qlora', batch_size=2, objective=Standardised), Case('ddp', 'lora', objective=Anchored),
    Case('ddp', 'lora', sequence=2, objective=Standardised), Case('fsdp', 'qlora', sequence=2, objective=Smoothed),
]  # fmt: skip


@pytest.fixture(scope='module')
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, dict[str, Any]]]:
    yield run_ranks(2, tmp_path_factory.mktemp('ranks'), CASES)


def test_two_ranks_are_one_process(on_two_ranks: dict[Case, dict[str, Any]], tmp_path: Path) -> None:
    references: dict[Any, dict[str, Any]] = {}
    for case, result in on_two_ranks.items():
        key = case.method, case.objective
        if key not in references:
            references[key] = alone(case.method, tmp_path, case.objective)
        expected = references[key]
        assert result['loss'] == pytest.approx(expected['loss'], rel=TOLERANCE), case
        assert furthest(result['gradient'], expected['gradient']) < 3 * TOLERANCE, case
        for name in {'entropy', 'far'} & set(expected):
            assert result[name] == pytest.approx(expected[name], rel=TOLERANCE), case
    assert {'entropy', 'far'} <= {name for result in on_two_ranks.values() for name in result}
