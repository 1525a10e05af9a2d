"""The loop: the gradient of a step does not depend on how it is cut up, a bad step changes nothing, a run resumes."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.config.schema import ScheduleConfig
from xtuner.dataset.packing.collate import collate
from xtuner.dataset.packing.sampler import EpochSampler
from xtuner.engine.checkpoint.store import write_checkpoint
from xtuner.engine.distributed import Single
from xtuner.engine.hooks import CheckpointHook, LogHook
from xtuner.engine.runner import Runner
from xtuner.engine.schedule import StepSampler, TrainingSchedule
from xtuner.errors import CheckpointError, TrainingError
from xtuner.objectives.sft import SupervisedFinetune

VOCABULARY = 53


def make_items(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Samples of 3 to 20 tokens, part of them targets."""
    random = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        ids = random.integers(0, VOCABULARY, random.integers(3, 21))
        labels = np.where(random.random(len(ids)) < 0.6, ids, -100)
        labels[0], labels[-1] = -100, ids[-1]
        items.append({'input_ids': ids, 'labels': labels, 'position_ids': np.arange(len(ids))})
    return items


def make_model(seed: int = 0, *, dropout: float = 0.0) -> SupervisedFinetune:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.3, attention_dropout=dropout)  # fmt: skip
    return SupervisedFinetune(LlamaForCausalLM(config))


def make_runner(work_dir: Path, items: list[Any], model: SupervisedFinetune, *, lr: float = 0.05, nonfinite: int = 3,
                dtype: torch.dtype = torch.float32, **schedule: Any) -> Runner:  # fmt: skip
    plan = TrainingSchedule(len(items), ScheduleConfig(**schedule))
    loader = DataLoader(items, batch_sampler=StepSampler(EpochSampler(len(items), seed=3), plan),
                        collate_fn=lambda batch: collate(batch, pad_id=0))  # fmt: skip
    strategy = Single().prepare(model, lambda parameters: torch.optim.AdamW(parameters, lr=lr))
    runner = Runner(strategy, loader, hooks=[LogHook()], work_dir=work_dir,
                    seed=0, trackers=[], launcher='none', write_model=lambda folder, weights: None)  # fmt: skip
    runner.set_loop(plan=plan, compute_dtype=dtype, seed=5, max_nonfinite_steps=nonfinite)
    return runner


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def reference_gradient(items: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over all targets of the negative log-likelihood in float64, sample by sample, with plain transformers."""
    llm = make_model().double().llm
    targets = sum(int((item['labels'] != -100).sum()) for item in items)
    total = torch.zeros((), dtype=torch.float64)
    for item in items:
        logits = llm(torch.tensor(item['input_ids'])[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(item['labels'])[1:], reduction='sum')
    (total / targets).backward()
    return total.item() / targets, {n: p.grad for n, p in llm.named_parameters()}


@pytest.mark.parametrize(('batch_size', 'accumulate'), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    items, model = make_items(8), make_model()
    runner = make_runner(tmp_path, items, model, max_steps=1, batch_size=batch_size, accumulative_counts=accumulate,
                         max_norm=None)  # fmt: skip
    gradients: dict[str, torch.Tensor] = {}
    optimizer = runner.optim_wrapper.optimizer
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.llm.named_parameters()})
    )
    runner.train()
    loss, expected = reference_gradient(items)
    assert metrics(tmp_path)[0]['loss'] == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert metrics(tmp_path)[0]['grad_norm'] == pytest.approx(norm, rel=1e-4)
    for name, gradient in gradients.items():  # float32 sums in another order: 1e-5 of the largest entry
        assert torch.allclose(gradient.double(), expected[name], atol=1e-5 * float(expected[name].abs().max())), name


def test_a_step_without_finite_gradient_changes_nothing_and_too_many_end_the_run(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.llm.model.norm.weight[0] = math.nan
    before = {n: p.clone() for n, p in model.named_parameters()}
    runner = make_runner(tmp_path, make_items(4), model, max_steps=9, accumulative_counts=2, nonfinite=3)
    with pytest.raises(TrainingError, match=r'3 steps in a row had no finite gradient \(last: step 3'):
        runner.train()
    assert [m['skipped'] for m in metrics(tmp_path)] == [True] * 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or name.endswith('model.norm.weight')


def test_a_checkpoint_is_told_as_the_work_folder_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger('xtuner'), 'propagate', True)
    runner = make_runner(Path('run'), make_items(2), make_model(), max_steps=1)
    runner.register_hook(CheckpointHook(interval=1, max_keep=1))
    with caplog.at_level(logging.INFO, 'xtuner'):
        runner.train()
    assert 'saved run/checkpoint-00000001' in caplog.text


def test_no_target_is_an_error(tmp_path: Path) -> None:
    items = make_items(2)
    for item in items:
        item['labels'][:] = -100
    with pytest.raises(TrainingError, match=r'step 1: every token of .* is masked'):
        make_runner(tmp_path, items, make_model(), max_steps=1, accumulative_counts=2).train()


@pytest.mark.parametrize(('stop_at', 'dtype'), [(1, torch.float32), (3, torch.float32), (3, torch.float16)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stop_at: int, dtype: torch.dtype) -> None:
    """Mid-epoch, with accumulation and dropout; with float16, the loss scale and its count of good steps as well."""
    items = make_items(7)
    schedule: dict[str, Any] = {'max_steps': 5, 'accumulative_counts': 3, 'batch_size': 2, 'dtype': dtype}
    whole = make_model(dropout=0.2)
    uninterrupted = make_runner(tmp_path / 'whole', items, whole, **schedule)
    uninterrupted.train()

    first = make_model(dropout=0.2)
    runner = make_runner(tmp_path / 'cut', items, first, **schedule)
    saved: dict[str, Any] = {}

    def stop(step: int) -> None:
        folder = write_checkpoint(tmp_path / 'cut', step, write_model=lambda _: None,
                                  state=runner.trainer_state(step), max_keep=1)  # fmt: skip
        saved.update(folder=folder, weights={n: p.clone() for n, p in first.state_dict().items()})

    original = runner.train_loop.run_iter

    def run_iter(batches: Any) -> None:
        original(batches)
        if runner.iter == stop_at:
            stop(stop_at)
            raise KeyboardInterrupt

    runner.train_loop.run_iter = run_iter
    with pytest.raises(KeyboardInterrupt):
        runner.train()

    torch.manual_seed(999)  # what happened in between must not matter
    second = make_model(seed=1, dropout=0.2)
    second.load_state_dict(saved['weights'])
    resumed = make_runner(tmp_path / 'cut', items, second, **schedule)
    resumed.restore(saved['folder'])
    resumed.train_loop.dataloader.batch_sampler.start_step = resumed.iter
    resumed.train()
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, second.state_dict()[name]), name
    keys = ('step', 'loss', 'lr', 'grad_norm', 'num_targets')
    assert [[m[k] for k in keys] for m in metrics(tmp_path / 'cut')] == [
        [m[k] for k in keys] for m in metrics(tmp_path / 'whole')
    ]
    scaler = uninterrupted.train_loop.scaler.state_dict()
    assert resumed.train_loop.scaler.state_dict() == scaler
    assert dtype != torch.float16 or scaler['_growth_tracker'] > 5 - stop_at


def test_training_learns(tmp_path: Path) -> None:
    make_runner(tmp_path, make_items(4), make_model(), max_steps=40, accumulative_counts=4, lr=0.02).train()
    losses = [m['loss'] for m in metrics(tmp_path)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_loss_that_is_not_finite_beside_finite_gradients_changes_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model()
    model.register_forward_hook(lambda module, arguments, loss: loss + math.inf)
    before = {n: p.clone() for n, p in model.named_parameters()}
    runner = make_runner(tmp_path, make_items(4), model, max_steps=2, accumulative_counts=2, dtype=dtype)
    runner.train()
    assert [(m['skipped'], math.isfinite(m['grad_norm'])) for m in metrics(tmp_path)] == [(True, True)] * 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize('key', ['step', 'parameters', 'optimizer', 'scaler', 'skips', 'activation_rooms'])
def test_a_state_that_lacks_something_is_told(tmp_path: Path, key: str) -> None:
    runner = make_runner(tmp_path, make_items(2), make_model(), max_steps=2)
    state = {k: v for k, v in runner.trainer_state(1).items() if k != key}
    folder = write_checkpoint(tmp_path, 1, write_model=lambda _: None, state=state, max_keep=1)
    with pytest.raises(CheckpointError, match=f'cannot resume, its trainer state has no {key!r}'):
        runner.restore(folder)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('optimizer', {}, 'trainer state does not fit this run'),
        ('skips', {'none': 1}, 'trainer state does not fit this run'),
        ('skips', 5, '`skips` must be a dict, got 5'),
        ('scaler', [], '`scaler` must be a dict, got '),
    ],
)
def test_a_state_of_another_form_is_told(tmp_path: Path, key: str, value: Any, message: str) -> None:
    runner = make_runner(tmp_path, make_items(2), make_model(), max_steps=2, dtype=torch.float16)
    state = runner.trainer_state(1) | {key: value}
    folder = write_checkpoint(tmp_path, 1, write_model=lambda _: None, state=state, max_keep=1)
    with pytest.raises(CheckpointError, match=message):
        runner.restore(folder)
