"""Shows what the model is about to see."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.dataset.show import show_sample
from xtuner.dataset.stream import PackStream
from xtuner.errors import DataError

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
        """Prints, on the first rank only; of a stream, what became of the first window's records too.

        Raises:
            DataError: Where a stream holds nothing to train.
        """
        if runner.rank != 0:
            return
        item = next(iter(self._dataset), None)
        is_stream = isinstance(self._dataset, PackStream)  # other data said so as it was prepared
        lines = self._dataset.summary.lines() if is_stream else []
        if item is None:
            raise DataError(f'`dataset.source` holds no conversation to train; {" | ".join(lines)}')
        for line in lines:
            logger.info('data, so far: %s', line)
        logger.info('first item, trained text between « and »:\n%s', self.preview(item))

    def preview(self, item: dict[str, Any]) -> str:
        """The item's text, trained tokens between « and » as `xtuner log-dataset` shows them, cut at `max_chars`."""
        sample = Sample(np.asarray(item['input_ids']), np.asarray(item['labels']))
        text = show_sample(sample, self._tokenizer, color=False).strip()
        return text if len(text) <= self._max_chars else f'{text[: self._max_chars]} … ({len(text)} characters)'
