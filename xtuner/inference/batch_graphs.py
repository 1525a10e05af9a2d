"""The step of a batch recorded as CUDA graphs, one for each power of two of rows and of places looked at.

A 7B model's step is some thousand kernels, most of which the GPU runs sooner than Python can launch the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger('xtuner')

_MIN_LENGTH = 256  # places
_WARMUPS = 2  # passes before recording: what is tried or set up at first must not be recorded
_MAX_ERROR = (
    0.1  # of a row's logits: rounding in half precision is some hundredths of that, a wrong place or row all of it
)

Forward = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class _RecordedStep:
    graph: Any  # torch.cuda.CUDAGraph
    ids: Tensor  # (B, 1)
    positions: Tensor  # (B, 1)
    logits: Tensor  # (B, V)


class StepGraphs:
    """Replays a step where it was recorded, and records it where it was not.

    Args:
        forward: The step of rows 0 to B - 1: ids and positions, int64 (B, 1), and places to look at, to logits (B, V).
            It must not wait for the GPU.
        num_rows: Most rows.
        max_length: Most places.
        device: The GPU.
    """

    def __init__(self, forward: Forward, *, num_rows: int, max_length: int, device: torch.device) -> None:
        self._forward, self._num_rows, self._max_length, self._device = forward, num_rows, max_length, device
        self._recorded: dict[tuple[Hashable, int, int], _RecordedStep] = {}
        self._pool: Any = None
        self.reason_disabled = ''  # why nothing can be recorded

    def step(self, ids: Sequence[int], lengths: Sequence[int], key: Hashable) -> Tensor | None:
        """Logits (B, V) of rows 0 to B - 1, valid until the next call; None where the step cannot be recorded.

        Rows up to the next power of two are computed too: they must be free, and get a token at place 0.

        Args:
            ids: The new id of each row.
            lengths: How many ids each row holds.
            key: What else the step depends on, such as the active adapter.
        """
        if self.reason_disabled:
            return None
        num = len(ids)
        rows = min(1 << (num - 1).bit_length(), self._num_rows)
        length = min(max(1 << max(lengths).bit_length(), _MIN_LENGTH), self._max_length)
        recorded = self._recorded.get((key, rows, length))
        if recorded is None:
            recorded = self._record(rows, length)
            if recorded is None:
                return None
            self._recorded[key, rows, length] = recorded
        spare = [0] * (rows - num)
        both = torch.tensor([[*ids, *spare], [*lengths, *spare]], device=self._device)
        recorded.ids.copy_(both[0][:, None])
        recorded.positions.copy_(both[1][:, None])
        recorded.graph.replay()
        return recorded.logits[:num]

    def _record(self, rows: int, length: int) -> _RecordedStep | None:
        ids, positions = (torch.zeros(rows, 1, dtype=torch.long, device=self._device) for _ in range(2))
        # Recorded over places that the rows have not reached: what is in the store stays as it is.
        positions.fill_(length - 1)
        try:
            graph, logits, expected = self._capture(ids, positions, length)
            graph.replay()
            deviation = relative_error(logits, expected)
        except RuntimeError as error:  # the model waits for the GPU somewhere
            self.reason_disabled = ' '.join(str(error).split())[:200]
        else:
            if deviation <= _MAX_ERROR:
                return _RecordedStep(graph, ids, positions, logits)
            self.reason_disabled = (
                f'a recorded step gave other logits than the step itself: {deviation:.2g} of their size away'
            )
        logger.info('steps are not recorded, which is slower: %s', self.reason_disabled)
        return None

    def _capture(self, ids: Tensor, positions: Tensor, length: int) -> tuple[Any, Tensor, Tensor]:
        """The recording, where its logits lie, and what they must be for these ids."""
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
    """How far the row that is farthest lies from what is expected, as a share of that one's size."""
    norms = [torch.linalg.vector_norm(x.float(), dim=-1) for x in (logits_BV - expected_BV, expected_BV)]
    return float((norms[0] / norms[1].clamp(min=1e-30)).amax().nan_to_num(torch.inf))
