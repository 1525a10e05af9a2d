"""A causal language model and an objective as one module: its forward pass is the training loss.

Shapes: B rows, S tokens a row, N = B * S positions, T targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.errors import ConfigError, TrainingError
from xtuner.fused.enable import reads_host_positions, share_sequences
from xtuner.fused.loss import target_rows
from xtuner.fused.target_values import BASE_VALUES, VALUES
from xtuner.fused.ulysses import SequenceGroup
from xtuner.model.families.find import spec_of
from xtuner.model.logits import LogitRule
from xtuner.objectives.base import (
    Objective,
    Statistics,
    TargetRows,
    as_loss,
    as_statistics,
    check_needs,
    errors_named,
    needs_base,
)
from xtuner.objectives.head import is_plain, next_token_loss, target_values, values_of_logits


class TrainingModel(nn.Module):
    """A causal language model whose forward pass is an objective's loss.

    The loss is a sum, not a mean: only the loop knows the weight of the whole optimizer step (accumulated, on all
    ranks), over which it is averaged.

    Args:
        llm: A transformers causal language model, bare or wrapped by peft.
        objective: What is minimised.

    Attributes:
        rule: What the model does to its head's logits; None: only its own forward pass knows.
        metrics: Of the last loss, by name; sums, as the loss is.
    """

    llm: Any

    def __init__(self, llm: Any, objective: Objective) -> None:
        super().__init__()
        self.llm = llm
        check_needs(objective, objective.name)
        self.objective = objective
        self.rule: LogitRule | None = spec_of(self.base.config).logits(self.base.config)
        self.metrics: dict[str, Tensor] = {}
        self._sequence: SequenceGroup | None = None

    @property
    def base(self) -> Any:
        """The causal language model behind peft's wrapper."""
        return self.llm.get_base_model() if hasattr(self.llm, 'get_base_model') else self.llm

    def share_sequences(self, ranks: SequenceGroup) -> None:
        """From now on each row is spread over these ranks, which get the same batches; the loss is this rank's part."""
        share_sequences(self.llm, ranks)
        self._sequence = ranks

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        *,
        statistics: Statistics | None = None,
        only_statistics: bool = False,
        **batch: Tensor,
    ) -> Any:
        """The objective's loss over a micro-batch; its metrics are left in `metrics`.

        Args:
            input_ids: int64 (B, S).
            labels: int64 (B, S), unshifted; -100 where nothing is learnt.
            position_ids: int64 (B, S); 0 where a sample begins, which is what separates the samples of a pack.
            statistics: The objective's statistics, summed over the step and all ranks.
            only_statistics: Return the objective's statistics of this micro-batch in place of the loss.
            batch: What else the objective's `collate` returned.

        The first three may lie on the host, and should for a GPU: where the targets are and where samples begin is then
        known without waiting for what the GPU still has to do.

        Returns:
            float32 scalar, a sum; 0 with a gradient where there is no target. Or statistics by name.
        """
        rows = self._rows(input_ids, labels, position_ids, batch)
        if only_statistics:
            with errors_named(self.objective, 'statistics'):
                sums = self.objective.statistics(rows)
            return as_statistics(self.objective, sums, rows.device)
        with errors_named(self.objective):
            found = self.objective.loss(rows, statistics)
        loss, self.metrics = as_loss(self.objective, found, rows.device)
        if torch.is_grad_enabled() and not loss.requires_grad and any(p.requires_grad for p in self.parameters()):
            raise TrainingError(
                f'objective {self.objective.name}: the loss has no gradient; was a value detached or listed in '
                '`no_grad`?'
            )
        return loss

    def _rows(self, ids: Tensor, labels: Tensor, positions: Tensor, batch: dict[str, Tensor]) -> TargetRows:
        """Runs the decoder, and computes of the targets what the objective needs."""
        base, needs = self.base, self.objective.needs
        fields: dict[str, Any] = {'batch': batch}
        samples, num_samples = _sample_numbers(positions, labels) if 'samples' in needs else (None, 0)
        if str(base.config._attn_implementation).startswith('flash'):
            # It tells samples apart by their positions in a batch of one row only.
            ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        # The labels move, not the hidden states, which are many times larger; the last of a row predicts nothing.
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).view(ids.shape)
        own_positions = positions
        if self._sequence is not None:
            ids, targets, positions = _own_part(self._sequence, ids, targets, positions)
            own_positions = self._sequence.local_slice(positions)
        targets_N = targets.reshape(-1)
        rows = target_rows(targets_N)
        device = base.get_output_embeddings().weight.device
        if samples is not None:
            fields |= {'num_samples': num_samples, 'samples': samples[rows].to(device)}
        if 'positions' in needs:
            fields['positions'] = own_positions.reshape(-1)[rows].to(device)
        ids, targets_N, rows = (t.to(device, non_blocking=True) for t in (ids, targets_N, rows))
        if 'labels' in needs:
            fields['labels'] = targets_N[rows]
        if not reads_host_positions(base.get_decoder()):
            positions = positions.to(device)
        compute = self._from_logits if self.rule is None else self._from_hidden_states
        # The base first: its activations are gone when those of the pass with gradients are kept.
        reference = self._of_base(ids, positions, rows) if needs_base(self.objective) else {}
        fields |= compute(ids, positions, targets_N, rows, **reference)
        return TargetRows(count=len(rows), device=device, vocabulary=_vocabulary(base), **fields)

    def _from_hidden_states(
        self, ids: Tensor, positions: Tensor, targets_N: Tensor, rows: Tensor, **reference: Tensor
    ) -> dict[str, Any]:
        """What is asked for, from the decoder's last hidden states and the head."""
        needs, head, rule = self.objective.needs, self.base.get_output_embeddings(), self.rule
        assert rule is not None
        hidden_NH = self._hidden_states(ids, positions)
        found: dict[str, Any] = {}
        if 'nll_sum' in needs:
            found['nll_sum'] = next_token_loss(hidden_NH, head, targets_N, rows=rows, rule=rule)
        if 'hidden' in needs:
            found['hidden'] = hidden_NH[rows]
        values = [name for name in needs if name in VALUES]
        if values:
            found |= target_values(
                hidden_NH, head, targets_N, values, rows=rows, rule=rule, no_grad=self.objective.no_grad, **reference
            )
        return found

    def _from_logits(
        self, ids: Tensor, positions: Tensor, targets_N: Tensor, rows: Tensor, **reference: Tensor
    ) -> dict[str, Any]:
        """What is asked for, from the logits of the model's own forward pass."""
        needs = self.objective.needs
        logits_TV, targets_T = self._logits(ids, positions)[rows].float(), targets_N[rows]
        found: dict[str, Any] = {}
        if 'nll_sum' in needs:
            found['nll_sum'] = functional.cross_entropy(logits_TV, targets_T, reduction='sum')
        if 'hidden' in needs:
            raise ConfigError(
                f'the objective asks for hidden states, and a model of type {self.base.config.model_type!r} gives only '
                'logits'
            )
        values = [name for name in needs if name in VALUES]
        found |= values_of_logits(logits_TV, targets_T, values, no_grad=self.objective.no_grad, **reference)
        return found

    @torch.no_grad()
    def _of_base(self, ids: Tensor, positions: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The base model's side of what is compared with it, by the model's own forward pass and without dropout."""
        if not hasattr(self.llm, 'disable_adapter'):
            names = [name for name in self.objective.needs if name in BASE_VALUES]
            raise ConfigError(
                f'the objective asks for {names[0]}, which needs an adapter: without one there is no base'
            )
        training = self.llm.training
        self.llm.eval()
        try:
            with self.llm.disable_adapter():
                if self.rule is None:
                    return {'base_TV': self._logits(ids, positions)[rows].float()}
                hidden_TH, head = self._hidden_states(ids, positions)[rows], self.base.get_output_embeddings()
                if is_plain(head):
                    return {'base_hidden_TH': hidden_TH}
                return {'base_logits_TV': self.rule.apply(head(hidden_TH).float())}
        finally:
            self.llm.train(training)

    def _hidden_states(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The decoder's last hidden states, (N, H)."""
        output = self.base.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state.reshape(-1, output.last_hidden_state.shape[-1])

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits of the model's own forward pass, (N, V)."""
        return self.base(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)

    def train_step(self, *args: object) -> None:
        """Present because mmengine's runner asks for the name; `TrainLoop` does the step."""
        raise AssertionError('TrainLoop computes the step; nothing calls train_step')


def _own_part(ranks: SequenceGroup, ids: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's stretch of ids and targets, (B, S / P) each, and all positions; rows filled up to a multiple of P."""
    missing = -ids.shape[1] % ranks.size
    ids = functional.pad(ids, (0, missing))
    targets = functional.pad(targets, (0, missing), value=IGNORE_INDEX)
    filling = torch.arange(missing, device=positions.device).expand(len(positions), -1)  # a sample without targets
    return ranks.local_slice(ids), ranks.local_slice(targets), torch.cat([positions, filling], dim=1)


def _sample_numbers(positions_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, int]:
    """The sample that each token belongs to, int64 (N,), and the number of samples.

    A sample begins wherever positions do not go on by one. The last of a row is padding if it has no target, and is
    not counted.
    """
    begins = functional.pad(positions_BS[:, 1:] != positions_BS[:, :-1] + 1, (1, 0), value=True)
    within = begins.cumsum(1) - 1  # counted from 0 in each row
    last = within[:, -1]
    trained = ((labels_BS != IGNORE_INDEX) & (within == last[:, None]))[:, 1:].any(1)
    sizes = last + trained
    before = sizes.cumsum(0) - sizes
    return (within + before[:, None]).flatten(), int(sizes.sum())


def _vocabulary(base: Any) -> int:
    """Logits of a token."""
    return getattr(base.get_output_embeddings(), 'out_features', None) or base.config.vocab_size
