"""Decode steps of a batch recorded as CUDA graphs, one per power of two of slots and of attended positions.

The step of a 7B model is some thousand kernels, most of which the GPU runs faster than Python can launch the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger('xtuner')

_MIN_LENGTH = 256  # positions
_WARMUPS = 2  # runs before recording, since lazy initialization must not be recorded
_MAX_ERROR = 0.1  # relative: fp16/bf16 rounding is a few percent of the norm; a wrong slot gives about 100 %

Forward = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class _RecordedStep:
    graph: Any  # torch.cuda.CUDAGraph
    ids: Tensor  # (B, 1)
    positions: Tensor  # (B, 1)
    logits: Tensor  # (B, V)


class StepGraphs:
    """Replays recorded decode steps, recording them at their first use.

    Args:
        forward: The step for slots 0 to B - 1: ids and positions, int64 (B, 1), and number of attended positions, to
            logits (B, V). It must not synchronize with the GPU.
        num_slots: Maximum number of slots.
        max_length: Maximum number of positions.
        device: The GPU.
    """

    def __init__(self, forward: Forward, *, num_slots: int, max_length: int, device: torch.device) -> None:
        self._forward, self._num_slots, self._max_length, self._device = forward, num_slots, max_length, device
        self._recorded: dict[tuple[Hashable, int, int], _RecordedStep] = {}
        self._pool: Any = None
        self.reason_disabled = ''  # why steps cannot be recorded

    def step(self, ids: Sequence[int], lengths: Sequence[int], key: Hashable) -> Tensor | None:
        """Returns logits (B, V) of slots 0 to B - 1, valid until the next call; None if the step cannot be recorded.

        Slots up to the next power of two are computed too: they must be free, and a token is written at position 0.

        Args:
            ids: The new token id of each slot.
            lengths: Number of cached tokens of each slot.
            key: Anything else that the step depends on, such as the active adapter.
        """
        if self.reason_disabled:
            return None
        num = len(ids)
        num_slots = min(1 << (num - 1).bit_length(), self._num_slots)
        length = min(max(1 << max(lengths).bit_length(), _MIN_LENGTH), self._max_length)
        recorded = self._recorded.get((key, num_slots, length))
        if recorded is None:
            recorded = self._record(num_slots, length)
            if recorded is None:
                return None
            self._recorded[key, num_slots, length] = recorded
        spare = [0] * (num_slots - num)
        both = torch.tensor([[*ids, *spare], [*lengths, *spare]], device=self._device)
        recorded.ids.copy_(both[0][:, None])
        recorded.positions.copy_(both[1][:, None])
        recorded.graph.replay()
        return recorded.logits[:num]

    def _record(self, num_slots: int, length: int) -> _RecordedStep | None:
        ids, positions = (torch.zeros(num_slots, 1, dtype=torch.long, device=self._device) for _ in range(2))
        # Recorded at positions that no slot has reached, so that the KV cache does not change.
        positions.fill_(length - 1)
        try:
            graph, logits, expected = self._capture(ids, positions, length)
            graph.replay()
            deviation = relative_error(logits, expected)
        except RuntimeError as error:  # the model synchronizes with the GPU
            self.reason_disabled = ' '.join(str(error).split())[:200]
        else:
            if deviation <= _MAX_ERROR:
                return _RecordedStep(graph, ids, positions, logits)
            self.reason_disabled = (
                f'the logits of a recorded step differ from those of the step itself (relative error {deviation:.2g})'
            )
        logger.info('CUDA graphs disabled for decoding (slower): %s', self.reason_disabled)
        return None

    def _capture(self, ids: Tensor, positions: Tensor, length: int) -> tuple[Any, Tensor, Tensor]:
        """The graph, its output buffer of logits, and the expected logits for these ids."""
        here, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_WARMUPS):
                expected = self._forward(ids, positions, length)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode='thread_local'):
            logits = self._forward(ids, positions, length)
        self._pool = self._pool or graph.pool()
        return graph, logits, expected


def relative_error(logits_BV: Tensor, expected_BV: Tensor) -> float:
    """Relative error of the logits (norm of the difference over norm), maximum over rows."""
    norms = [torch.linalg.vector_norm(x.float(), dim=-1) for x in (logits_BV - expected_BV, expected_BV)]
    return float((norms[0] / norms[1].clamp(min=1e-30)).amax().nan_to_num(torch.inf))
