"""Objectives on target rows against the same losses in float64 from all logits, with gradients by the adapter."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.model.random_models import make_model
from tests.objectives.toys import PLAIN, Anchored, Preference, Rewritten, Sample, Smoothed
from xtuner.errors import ConfigError, TrainingError
from xtuner.fused.enable import enable_fused_training
from xtuner.objectives.base import Objective, weight_of
from xtuner.objectives.model import TrainingModel

WORDS = 97
LENGTHS = ((9, 5, 7, 6), (12, 4))  # of the samples of two rows; the second is filled up
# float32 against float64 through two layers; logits of other families are larger, and so is their rounding.
TOLERANCE = 2e-4


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    longest = max(sum(lengths) for lengths in LENGTHS)
    ids = torch.randint(3, WORDS, (len(LENGTHS), longest), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.7, ids, -100)
    positions = torch.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        filled = (*lengths, longest - sum(lengths))
        positions[row] = torch.cat([torch.arange(length) for length in filled])
        labels[row, sum(lengths) :] = -100
        ends = torch.tensor(lengths).cumsum(0)
        labels[row, ends - 1] = ids[row, ends - 1]  # every sample has a target
    labels[positions == 0] = -100
    return {'input_ids': ids, 'labels': labels, 'position_ids': positions}


def adapted(kind: str, **settings: Any) -> Any:
    """A model under an adapter that is not zero; `settings` go to its config."""
    llm = make_model(kind).requires_grad_(False)
    config = LoraConfig(r=3, task_type='CAUSAL_LM', **{'target_modules': 'all-linear'} | settings)
    llm = get_peft_model(llm, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if 'lora_B' in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return llm


def fused() -> Any:
    llm = adapted('llama')
    assert enable_fused_training(llm).enabled
    return llm


MODELS = {
    'lora': lambda: adapted('llama'),
    'on the fused path': fused,
    'a soft cap': lambda: adapted('gemma2'),
    'a scale': lambda: adapted('granite'),
    'an adapter on the head': lambda: adapted('llama', target_modules=['q_proj', 'lm_head']),
    'a head in modules_to_save': lambda: adapted('llama', modules_to_save=['lm_head']),
    'all weights': lambda: make_model('llama').requires_grad_(True),
    'all weights, a soft cap': lambda: make_model('gemma2').requires_grad_(True),
}


def plain_samples(llm: Any, batch: dict[str, Tensor]) -> list[Sample]:
    """Every sample by itself, through the model's own forward pass in float64."""
    twin = copy.deepcopy(llm)
    (twin.get_base_model() if hasattr(twin, 'get_base_model') else twin).get_decoder().__dict__.pop('forward', None)
    llm_64 = twin.double().eval()
    found = []
    for row, lengths in enumerate(LENGTHS):
        for start, end in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
            ids, labels = batch['input_ids'][row, start:end], batch['labels'][row, start + 1 : end]
            rows = labels != -100
            logits = llm_64(ids[None]).logits[0, :-1][rows]
            base = logits.detach()
            if hasattr(llm_64, 'disable_adapter'):
                with llm_64.disable_adapter(), torch.no_grad():
                    base = llm_64(ids[None]).logits[0, :-1][rows]
            found.append(Sample(logits, base, labels[rows]))
    plain_samples.model = llm_64  # type: ignore[attr-defined]
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {n.removeprefix('llm.'): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('own_forward', [False, True], ids=['', 'own forward'])
@pytest.mark.parametrize('kind', [Rewritten, Smoothed, Anchored, Preference])
@pytest.mark.parametrize('name', MODELS)
def test_an_objective_is_its_definition(name: str, kind: type[Objective], own_forward: bool) -> None:
    llm, batch = MODELS[name](), make_batch()
    if 'all weights' in name and kind in (Anchored, Preference):
        with pytest.raises(ConfigError, match='needs an adapter: without one there is no base'):
            TrainingModel(llm, kind())(**batch)
        return
    model: Any = TrainingModel(llm, kind()).train()
    if own_forward:
        model.rule = None
    samples = plain_samples(llm, batch)
    expected = PLAIN[kind](samples)
    expected.backward()
    loss = model(**batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    exact = gradients(plain_samples.model)  # type: ignore[attr-defined]
    ours = gradients(llm)
    assert ours.keys() == exact.keys()
    largest = max(float(value.norm()) for value in exact.values())
    for key, value in exact.items():
        assert float((ours[key] - value).norm()) < TOLERANCE * largest, key
    assert model.training


def test_metrics_are_sums() -> None:
    model, batch = TrainingModel(adapted('llama'), Smoothed()), make_batch()
    model(**batch)
    samples = plain_samples(model.llm, batch)
    entropy = sum(torch.distributions.Categorical(logits=one.logits).entropy().sum() for one in samples)
    assert model.metrics['entropy'].item() == pytest.approx(entropy.item(), rel=1e-5)  # type: ignore[union-attr]
    assert not model.metrics['entropy'].requires_grad


def test_rows_say_where_each_target_is() -> None:
    class Keep(Objective):
        needs = ('log_prob', 'hidden', 'labels', 'positions', 'samples')

        def loss(self, rows: Any, statistics: Any) -> Any:
            self.rows = rows
            return rows.log_prob.sum() + rows.hidden.sum(), {}

        def collate(self, items: Any, **settings: Any) -> Any:
            raise AssertionError

    batch, objective = make_batch(), Keep()
    model = TrainingModel(adapted('llama'), objective)
    model(**batch, quality=torch.tensor([1.0, 2.0])).backward()
    rows = objective.rows
    places = [(row, place) for row, place in (batch['labels'][:, 1:] != -100).nonzero().tolist()]
    assert rows.count == len(places) == len(rows.log_prob) == len(rows.hidden)
    assert rows.labels.tolist() == [batch['labels'][row, place + 1].item() for row, place in places]
    assert rows.positions.tolist() == [batch['position_ids'][row, place].item() for row, place in places]
    begins = (batch['position_ids'] == 0).flatten().cumsum(0).view(2, -1) - 1
    assert rows.samples.tolist() == [begins[row, place].item() for row, place in places]
    assert rows.num_samples == 6  # the padding of the second row is none
    assert rows.sum_by_sample(torch.ones(rows.count)).tolist() == [
        float(sum(begins[row, place] == number for row, place in places)) for number in range(6)
    ]
    assert rows.batch['quality'].tolist() == [1, 2]
    assert rows.vocabulary == WORDS


def test_without_a_target_a_loss_is_zero_with_a_gradient() -> None:
    batch = make_batch()
    batch['labels'].fill_(-100)
    for kind in (Rewritten, Smoothed, Anchored):
        model = TrainingModel(adapted('llama'), kind())
        loss = model(**batch)
        loss.backward()
        assert loss.item() == 0
        assert not any(value.any() for value in gradients(model).values())


def test_only_what_is_needed_is_computed() -> None:
    class Curious(Rewritten):
        asked = ''

        def loss(self, rows: Any, statistics: Any) -> Any:
            return getattr(rows, self.asked), {}

    objective = Curious()
    model = TrainingModel(adapted('llama'), objective)
    for objective.asked, words in [
        ('entropy', r"`rows.entropy` was not asked for; add 'entropy' to the objective's `needs`"),
        ('num_samples', "add 'samples' to"),
        ('logprob', "`rows.logprob` does not exist; did you mean 'log_prob'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            model(**make_batch())


def test_a_loss_that_is_not_summed_is_refused() -> None:
    class Long(Rewritten):
        def loss(self, rows: Any, statistics: Any) -> Any:
            return -rows.log_prob, {}

    with pytest.raises(TrainingError, match=r'objective Long: the loss must be a scalar tensor, got a tensor of shape'):
        TrainingModel(adapted('llama'), Long())(**make_batch())


def test_hidden_states_are_refused_where_a_model_gives_only_logits() -> None:
    class Reward(Rewritten):
        needs = ('hidden',)

    model = TrainingModel(adapted('llama'), Reward())
    model.rule = None
    with pytest.raises(ConfigError, match="asks for hidden states, and a model of type 'llama' gives only logits"):
        model(**make_batch())


def test_needs_that_do_not_exist_are_refused() -> None:
    class Wrong(Rewritten):
        needs = ('log_probs',)

    with pytest.raises(ConfigError, match=r"`Wrong`: `needs` names 'log_probs', which does not exist; did you mean"):
        TrainingModel(adapted('llama'), Wrong())


class Returning(Objective):
    """Returns, from the named method, what a function makes of the rows."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def loss(self, rows: Any, statistics: Any) -> Any:
        return self.make(rows)

    def statistics(self, rows: Any) -> Any:
        return self.make(rows)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda rows: None, 'Returning returned nothing; return the loss'),
        (lambda rows: (None, {}), 'Returning returned nothing; return the loss'),
        (lambda rows: -rows.log_prob, r'the loss must be a scalar tensor, got a tensor of shape \(\d+,\); sum it'),
        (lambda rows: 1.5, 'the loss must be a scalar tensor, got float'),
        (
            lambda rows: rows.log_prob.long().sum(),
            'the loss must be a scalar tensor, got a scalar tensor of torch.int64',
        ),
        (
            lambda rows: (rows.log_prob.sum(), {}, {}),
            r'must return the loss, or the loss and a dict of metrics, got \(a scalar tensor of .*, dict, dict\)',
        ),
        (lambda rows: (rows.log_prob.sum(), 3), r'or the loss and a dict of metrics, got \(.*, int\)'),
        (
            lambda rows: (-rows.log_prob.sum(), {'p': rows.log_prob}),
            r"Returning: metric 'p' must be one number, got shape \(\d+,\); sum it",
        ),
        (lambda rows: (-rows.log_prob.sum(), {'p': 'x'}), "Returning: metric 'p' must be one number, got str"),
        (lambda rows: (-rows.log_prob.sum(), {'p': None}), "Returning: metric 'p' must be one number, got NoneType"),
        (
            lambda rows: -rows.log_prob.detach().sum(),
            'Returning: the loss has no gradient; was a value detached or listed in `no_grad`',
        ),
    ],
)
def test_what_is_no_loss_is_named(make: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=f'objective {message}' if message[0] == 'R' else message) as caught:
        TrainingModel(adapted('llama'), Returning(make))(**make_batch())
    assert '\n' not in str(caught.value)


def test_a_loss_without_metrics_may_be_returned_alone() -> None:
    model = TrainingModel(adapted('llama'), Returning(lambda rows: -rows.log_prob.sum()))
    pair = TrainingModel(adapted('llama'), Rewritten())
    assert torch.equal(model(**make_batch()), pair(**make_batch()))
    assert model.metrics == {}


def test_validation_needs_no_gradient() -> None:
    model = TrainingModel(adapted('llama'), Returning(lambda rows: -rows.log_prob.detach().sum()))
    with torch.no_grad():
        assert model(**make_batch()).item() > 0


def test_numbers_among_statistics_become_tensors() -> None:
    model = TrainingModel(
        adapted('llama'), Returning(lambda rows: {'count': rows.count, 'half': np.float32(0.5), 't': rows.log_prob})
    )
    found = model(**make_batch(), only_statistics=True)
    assert found['count'].dtype == found['half'].dtype == torch.float64
    assert found['half'].item() == 0.5
    assert found['count'].item() == len(found['t'])


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda rows: None, 'returned nothing; return a dict of tensors'),
        (lambda rows: rows.log_prob.sum(), 'must return a dict of tensors, got a scalar tensor'),
        (lambda rows: {'a': 'x'}, "must return tensors or numbers, got str for 'a'"),
        (lambda rows: {'a': {}['b']}, "failed in `statistics`: KeyError: 'b'"),
    ],
)
def test_what_are_no_statistics_is_named(make: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingModel(adapted('llama'), Returning(make))(**make_batch(), only_statistics=True)


@pytest.mark.parametrize('weight', [3, 3.0, np.int64(3), torch.tensor(3), torch.tensor([3.0])])
def test_a_weight_is_any_one_number(weight: Any) -> None:
    class Weighing(Rewritten):
        def weight(self, batch: Any) -> Any:
            return weight

    assert weight_of(Weighing(), {}) == 3
