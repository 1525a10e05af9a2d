"""The training loss: cross entropy summed over target tokens.

Shapes: B rows, S tokens a row, N = B * S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.fused.enable import reads_host_positions, share_sequences
from xtuner.fused.loss import fused_linear_cross_entropy, target_rows
from xtuner.fused.ulysses import SequenceGroup
from xtuner.model.logits import LogitRule, logit_rule

_PLAIN = LogitRule()


class SupervisedFinetune(nn.Module):
    """A causal language model whose forward pass is the training loss.

    The loss is a sum, not a mean: only the loop knows over how many targets the whole optimizer step (accumulated, on
    all ranks) has to be averaged.

    Attributes:
        rule: What the model does to its head's logits; None: only its own forward pass knows.
    """

    llm: Any

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm = llm
        self.rule: LogitRule | None = logit_rule(self.base.config)
        self._sequence: SequenceGroup | None = None

    @property
    def base(self) -> Any:
        """The causal language model behind peft's wrapper."""
        return self.llm.get_base_model() if hasattr(self.llm, 'get_base_model') else self.llm

    def share_sequences(self, ranks: SequenceGroup) -> None:
        """From now on each row is spread over these ranks, which get the same batches; the loss is this rank's part."""
        share_sequences(self.llm, ranks)
        self._sequence = ranks

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """Sums the negative log-likelihood of the targets.

        Args:
            input_ids: int64 (B, S).
            labels: int64 (B, S), unshifted; -100 where nothing is learnt.
            position_ids: int64 (B, S); 0 where a sample begins, which is what separates the samples of a pack.

        All three may lie on the host, and should for a GPU: where the targets are and where samples begin is then known
        without waiting for what the GPU still has to do.

        Returns:
            float32 scalar; 0 with a gradient where there is no target.
        """
        base = self.base
        if str(base.config._attn_implementation).startswith('flash'):
            # It tells samples apart by their positions in a batch of one row only.
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        # The labels move, not the hidden states, which are many times larger; the last of a row predicts nothing.
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).view(input_ids.shape)
        if self._sequence is not None:
            input_ids, targets, position_ids = _own_part(self._sequence, input_ids, targets, position_ids)
        targets_N = targets.reshape(-1)
        rows = target_rows(targets_N)
        decoder, device = base.get_decoder(), base.get_output_embeddings().weight.device
        input_ids, targets_N, rows = (t.to(device, non_blocking=True) for t in (input_ids, targets_N, rows))
        if not reads_host_positions(decoder):
            position_ids = position_ids.to(device)
        if self.rule is None:
            logits = base(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            return functional.cross_entropy(logits.flatten(0, 1)[rows].float(), targets_N[rows], reduction='sum')
        output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden_NH = output.last_hidden_state.reshape(-1, output.last_hidden_state.shape[-1])
        return next_token_loss(hidden_NH, base.get_output_embeddings(), targets_N, rows=rows, rule=self.rule)

    def train_step(self, *args: object) -> None:
        """Present because mmengine's runner asks for the name; `TrainLoop` does the step."""
        raise AssertionError('TrainLoop computes the step; nothing calls train_step')


def _own_part(ranks: SequenceGroup, ids: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's stretch of ids and targets, (B, S / P) each, and all positions; rows filled up to a multiple of P."""
    missing = -ids.shape[1] % ranks.size
    ids = functional.pad(ids, (0, missing))
    targets = functional.pad(targets, (0, missing), value=IGNORE_INDEX)
    filling = torch.arange(missing, device=positions.device).expand(len(positions), -1)  # a sample without targets
    return ranks.own(ids), ranks.own(targets), torch.cat([positions, filling], dim=1)


def next_token_loss(
    hidden_NH: Tensor, head: Any, targets_N: Tensor, *, rows: Tensor | None = None, rule: LogitRule = _PLAIN
) -> Tensor:
    """Sum over targets of `-log softmax(rule(head(hidden)))[target]`, computed for the target positions only.

    A plain linear head goes through the fused loss, which never holds all logits; a head that is quantised or carries
    an adapter is called as it is.

    Args:
        hidden_NH: Last hidden states, any float dtype.
        head: The output projection, H to V.
        targets_N: int64; -100 is left out.
        rows: Positions of the targets, where they are known already.
        rule: What comes behind the head.

    Returns:
        float32 scalar.
    """
    if _is_plain(head):
        kind = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
        # Put together for this call alone: gradients by the hidden states are computed here and now, too.
        weight, bias = _whole(head.weight), _whole(head.bias)
        if rule.scale != 1:
            hidden_NH, bias = hidden_NH * rule.scale, None if bias is None else bias * rule.scale
        return fused_linear_cross_entropy(hidden_NH.to(dtype), weight, bias, targets_N, rows=rows, cap=rule.cap)
    kept = target_rows(targets_N) if rows is None else rows
    logits = rule.apply(head(hidden_NH[kept]).float())
    return functional.cross_entropy(logits, targets_N[kept], reduction='sum')


def _is_plain(head: Any) -> bool:
    """Whether a head's output is `x W' + b` and its weight is here, or can be put together (see `_whole`)."""
    return getattr(type(head), 'forward', None) is nn.Linear.forward and not hasattr(head.weight, 'ds_id')


def _whole(parameter: Any) -> Any:
    """A parameter that `fully_shard` has spread, put together.

    Not by its module's `unshard`, which holds it twice for a moment: as it arrives and as it will lie. With 100,000
    words that was the peak of a whole step.
    """
    return parameter.full_tensor() if hasattr(parameter, 'full_tensor') else parameter
