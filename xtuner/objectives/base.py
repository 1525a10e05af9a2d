"""What an objective is: which values of each target token it asks for, and the loss that it makes of them.

One file an objective; docs/objectives.md shows how to add one.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from xtuner.dataset.packing.collate import collate, count_targets
from xtuner.errors import ConfigError, TrainingError, XTunerError, nearest
from xtuner.fused.target_values import BASE_VALUES, VALUES
from xtuner.utils.out_of_memory import is_out_of_memory

FIELDS = ('nll_sum', *VALUES, 'hidden', 'labels', 'positions', 'samples')
"""What `Objective.needs` may name: the attributes of `TargetRows`."""

Statistics = Mapping[str, Tensor]
Metrics = Mapping[str, Tensor]


class TargetRows:
    """The target tokens of a micro-batch, T of them in the order of the batch; only what `needs` names is there.

    Attributes:
        count: T.
        device: Of the values.
        nll_sum: float32 (), the negative log-likelihood summed over the targets, by the fused cross entropy.
        log_prob: float32 (T,), log p of the target, where p = softmax(logits).
        log_sum_exp: float32 (T,), log of the sum of exp(logits) (the log-partition function).
        entropy: float32 (T,), -sum_j p_j log p_j, in nats.
        sum_log_probs: float32 (T,), log p summed over the V words of the vocabulary.
        kl_to_base: float32 (T,), KL(p || q), where q is the distribution of the base model without the adapter.
        base_log_prob: float32 (T,), log q of the target, without a gradient.
        hidden: (T, H), last hidden states, from which the targets are predicted.
        labels: int64 (T,), the target's id.
        positions: int64 (T,), position of the token that predicts the target, within its sample.
        samples: int64 (T,), number of the target's sample in the micro-batch, counted from 0 row by row. What ends a
            row without a target is padding, and not counted.
        num_samples: int, samples in the micro-batch; with `samples`.
        vocabulary: int, V.
        batch: What `Objective.collate` returned beside ids, labels and positions, on the CPU.
    """

    count: int
    device: torch.device
    nll_sum: Tensor
    log_prob: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    sum_log_probs: Tensor
    kl_to_base: Tensor
    base_log_prob: Tensor
    hidden: Tensor
    labels: Tensor
    positions: Tensor
    samples: Tensor
    num_samples: int
    vocabulary: int
    batch: Mapping[str, Tensor]

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        if name in FIELDS or name == 'num_samples':
            field = 'samples' if name == 'num_samples' else name
            raise ConfigError(f"`rows.{name}` was not asked for; add '{field}' to the objective's `needs`")
        raise ConfigError(f'`rows.{name}` does not exist{nearest(name, FIELDS)}')

    def sum_by_sample(self, values_T: Tensor) -> Tensor:
        """Sums a value of each target over its sample, (num_samples,); needs `samples`."""
        return values_T.new_zeros(self.num_samples).index_add(0, self.samples, values_T)


class Objective:
    """The base class of objectives: the defaults are those of a loss averaged over target tokens.

    The gradient of an optimizer step is that of `sum of losses / sum of weights`, both over the micro-batches of the
    step and all ranks. So the weight comes from the batch alone (`weight`), not from the model's output: it is known
    before the first backward pass, and every gradient is normalised as it arises, under loss scaling, gradient
    reduction during the backward pass and DeepSpeed as well. What must be normalised by a value of the model's own
    output takes that value from `statistics`.

    Records become samples in the dataset package, in the same way for all objectives; batches may differ (`collate`).

    Attributes:
        name: For messages; the class's.
        needs: Names of `FIELDS`; each is computed only when it is named.
        no_grad: Those of them that the loss is not differentiated by, such as an entropy that is only logged; they cost
            no product with the output head.
    """

    name: str
    needs: Sequence[str] = ('log_prob',)
    no_grad: Sequence[str] = ()

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__

    def collate(self, items: Sequence[Mapping[str, Any]], *, pad_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
        """Joins items of the data set into a micro-batch: `dataset.packing.collate`.

        An override may add tensors of its own, which arrive as `rows.batch`, or join the items in another way; ids,
        labels and positions must be there.
        """
        return collate(items, pad_id=pad_id, multiple_of=multiple_of)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor | float:
        """What a micro-batch counts in the step's average: its target tokens.

        Ranks that share a pack each see all of it, and the sum over them is divided by their number.
        """
        return count_targets(batch['labels'])

    def statistics(self, rows: TargetRows) -> Statistics:
        """What the loss needs of the whole step: tensors by name, summed over its micro-batches and all ranks.

        An objective that overrides this has a statistics phase: another forward pass, without gradients, over all
        micro-batches of the step, with the same dropout masks. A step takes about a third longer in full tuning, and up
        to half as long again under an adapter, whose backward pass is shorter.
        """
        raise NotImplementedError

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics] | Tensor:
        """The loss summed over a micro-batch, and metrics.

        Args:
            rows: What `needs` names.
            statistics: Sums of what `statistics` returned over the step and all ranks, float64; None where the
                objective does not override it.

        Returns:
            A scalar, and by name a scalar to be summed like it: what is logged is the sum over the step divided by the
            step's weight. Names must be the same in every micro-batch. A scalar alone has no metrics.
        """
        raise NotImplementedError


def check_needs(objective: Objective, where: str) -> None:
    """Raises ConfigError for a field that is asked for and does not exist."""
    for attribute in ('needs', 'no_grad'):
        names = getattr(objective, attribute)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f'`{where}`: `{attribute}` must be a list of names, got {names!r}')
        known = FIELDS if attribute == 'needs' else tuple(objective.needs)
        for name in names:
            if name not in known:
                hint = nearest(name, known) or f'; known: {", ".join(known)}'
                raise ConfigError(f'`{where}`: `{attribute}` names {name!r}, which does not exist{hint}')


def has_statistics(objective: Objective) -> bool:
    """Whether an objective has a statistics phase."""
    return type(objective).statistics is not Objective.statistics


def needs_base(objective: Objective) -> bool:
    """Whether an objective compares with the base model without the adapter."""
    return any(name in BASE_VALUES for name in objective.needs)


@contextmanager
def errors_named(objective: Objective, method: str = '', batch: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Turns an error of a user's objective into one line with its place; running out of memory stays what it is.

    Args:
        objective: The user's.
        method: Its method that runs, for the message; '' for the loss.
        batch: What the method was given; the message lists its keys.
    """
    try:
        yield
    except XTunerError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if '/torch/' not in frame.filename]
        place = f' ({frames[-1].filename}:{frames[-1].lineno})' if frames else ''
        where = f' in `{method}`' if method else ''
        keys = '' if batch is None else f'; the batch has {", ".join(batch)}'
        raise TrainingError(
            f'objective {objective.name} failed{where}: {type(error).__name__}: {" ".join(str(error).split())}{place}'
            f'{keys}'
        ) from error


def check_methods(objective: Objective, where: str) -> None:
    """Raises ConfigError for a method that cannot be called as training calls it."""
    kind = type(objective)
    if kind.loss is Objective.loss:
        raise ConfigError(f'`{where}`: the class {objective.name} must define `loss(self, rows, statistics)`')
    for method in ('loss', 'statistics', 'weight', 'collate'):
        expected = inspect.signature(getattr(Objective, method))
        wanted = [p.replace(annotation=p.empty) for p in expected.parameters.values()]
        keywords = {p.name: None for p in wanted if p.kind is p.KEYWORD_ONLY}
        own = inspect.signature(getattr(objective, method))
        try:
            own.bind(*[None] * (len(wanted) - 1 - len(keywords)), **keywords)
        except TypeError as error:
            form = expected.replace(parameters=wanted, return_annotation=expected.empty)
            raise ConfigError(f'`{where}`: the class {objective.name} must define `{method}{form}`: {error}') from error


def as_loss(objective: Objective, found: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """What an objective's `loss` returned as the loss and its metrics, float64 scalars without a gradient.

    Raises:
        TrainingError: it returned nothing, or anything else than a scalar with or without a dict of numbers.
    """
    about = f'objective {objective.name}'
    if isinstance(found, (tuple, list)):
        if len(found) != 2 or not isinstance(found[1], Mapping):
            form = ', '.join(map(_form, found))
            raise TrainingError(f'{about} must return the loss, or the loss and a dict of metrics, got ({form})')
        loss, metrics = found
    else:
        loss, metrics = found, {}
    if loss is None:
        raise TrainingError(f'{about} returned nothing; return the loss')
    if not isinstance(loss, Tensor) or loss.dim() or not loss.dtype.is_floating_point:
        remedy = '; sum it' if isinstance(loss, Tensor) and loss.dim() else ''
        raise TrainingError(f'{about}: the loss must be a scalar tensor, got {_form(loss)}{remedy}')
    return loss, {name: _number(f'{about}: metric {name!r}', value, device) for name, value in metrics.items()}


def as_statistics(objective: Objective, found: Any, device: torch.device) -> dict[str, Tensor]:
    """What an objective's `statistics` returned, as tensors by name; numbers become float64.

    Raises:
        TrainingError: it returned no dict of tensors or numbers.
    """
    about = f'objective {objective.name}: `statistics`'
    if found is None:
        raise TrainingError(f'{about} returned nothing; return a dict of tensors')
    if not isinstance(found, Mapping):
        raise TrainingError(f'{about} must return a dict of tensors, got {_form(found)}')
    for name, value in found.items():
        if not isinstance(value, (Tensor, Real)):
            raise TrainingError(f'{about} must return tensors or numbers, got {_form(value)} for {name!r}')
    as_tensors = {
        name: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for name, v in found.items()
    }
    return {name: value.to(device) for name, value in as_tensors.items()}


def weight_of(objective: Objective, batch: Mapping[str, Tensor]) -> float:
    """`Objective.weight` of a batch; raises TrainingError where it fails or returns no single number."""
    with errors_named(objective, 'weight', batch):
        found = objective.weight(batch)
    if found is None:
        raise TrainingError(f'objective {objective.name}: `weight` returned nothing; return a number')
    return _number(f'objective {objective.name}: `weight`', found, torch.device('cpu')).item()


def _number(what: str, value: Any, device: torch.device) -> Tensor:
    """A number as a float64 scalar without a gradient; raises TrainingError for what is no single number."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(f'{what} must be one number, got {_form(value)}') from error
    if found.numel() != 1:
        raise TrainingError(f'{what} must be one number, got shape {tuple(found.shape)}; sum it')
    return found.reshape(())


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f'a tensor of shape {tuple(value.shape)}' if value.dim() else f'a scalar tensor of {value.dtype}'
