"""Decides when the layers are recorded as CUDA graphs, and keeps the recorded graphs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext
from xtuner.fused.cuda_graphs import LayerGraphs, can_record, signature

_RECORD_AFTER = 3  # consecutive batches of the same shape
_LOGGER = logging.getLogger('xtuner')


class GraphCache:
    """CUDA graphs for the batch shape that is in use.

    Attributes:
        enabled: Whether graphs may be recorded; set to False after a failure.
        graphs: The recorded graphs with their key (shape and `signature`), or None.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.graphs: tuple[tuple, LayerGraphs] | None = None
        self._last_shape: tuple | None = None
        self._streak = 0  # consecutive batches of the same shape
        self._unsupported = 0  # consecutive batches that cannot be recorded

    def find(self, layers: list[LayerContext], x_TH: Tensor) -> LayerGraphs | None:
        """Returns the graphs for a batch, recording them at the fourth consecutive batch of the same shape.

        None: the batch must be computed without graphs.
        """
        if not self.enabled or not can_record(layers, len(x_TH)):
            self._unsupported += 1
            if self._unsupported > _RECORD_AFTER:  # the batches have changed for good and may need the memory
                self.graphs = None
            return None
        self._unsupported = 0
        batch = layers[0].batch
        shape = (x_TH.shape, x_TH.dtype, batch.attention.graph_key, batch.policy.dtype, batch.num_recomputed > 0)
        self._streak = self._streak + 1 if shape == self._last_shape else 1
        self._last_shape = shape
        key = (shape, signature(layers))
        if self.graphs is None or self.graphs[0] != key:
            if self._streak <= _RECORD_AFTER:  # recording does not pay off for shapes that change often
                return None
            self.graphs = None  # frees the memory before more is allocated
            try:
                self.graphs = (key, LayerGraphs(layers, x_TH))
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                self.enabled = False
                _LOGGER.warning('CUDA graphs disabled for training (slower): %s', error)
                torch.cuda.empty_cache()
                return None
        graphs = self.graphs[1]
        return graphs if graphs.free else None
