"""Shows what the model is about to see."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from xtuner.dataset.show import show_sample
from xtuner.dataset.tokenize import Sample

logger = logging.getLogger('xtuner')


class DatasetInfoHook(Hook):
    """Prints the first item's text, trained parts marked, before training.

    Args:
        dataset: The prepared data set.
        tokenizer: Decodes the first item.
        max_chars: Where the printed text is cut.
    """

    def __init__(self, dataset: Any, tokenizer: Any, *, max_chars: int = 600) -> None:
        self._dataset, self._tokenizer, self._max_chars = dataset, tokenizer, max_chars

    def before_train(self, runner: Any) -> None:
        """Prints, on the first rank only."""
        if runner.rank != 0:
            return
        logger.info('first item, trained text between « and »:\n%s', self.preview(next(iter(self._dataset))))

    def preview(self, item: dict[str, Any]) -> str:
        """The item's text, trained tokens between « and » as `xtuner log-dataset` shows them, cut at `max_chars`."""
        sample = Sample(np.asarray(item['input_ids']), np.asarray(item['labels']))
        text = show_sample(sample, self._tokenizer, color=False).strip()
        return text if len(text) <= self._max_chars else f'{text[: self._max_chars]} … ({len(text)} characters)'
