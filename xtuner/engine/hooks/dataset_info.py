"""Logs the first item before training."""

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
    """Logs the first item's text with trained parts marked.

    Args:
        dataset: The prepared data set.
        tokenizer: Decodes the first item.
        max_chars: Maximum characters of the logged text.
    """

    def __init__(self, dataset: Any, tokenizer: Any, *, max_chars: int = 600) -> None:
        self._dataset, self._tokenizer, self._max_chars = dataset, tokenizer, max_chars

    def before_train(self, runner: Any) -> None:
        """Logs on the first rank only; for a stream, also the record counts of its first window.

        Raises:
            DataError: A stream contains nothing to train on.
        """
        if runner.rank != 0:
            return
        item = next(iter(self._dataset), None)
        is_stream = isinstance(self._dataset, PackStream)  # other data was summarized when it was prepared
        lines = self._dataset.summary.lines() if is_stream else []
        if item is None:
            raise DataError(f'`dataset.source` contains no conversation to train on; {" | ".join(lines)}')
        for line in lines:
            logger.info('data, so far: %s', line)
        logger.info('first item, trained text between « and »:\n%s', self.preview(item))

    def preview(self, item: dict[str, Any]) -> str:
        """The item's text, trained tokens between « and » as in `xtuner log-dataset`, truncated to `max_chars`."""
        sample = Sample(np.asarray(item['input_ids']), np.asarray(item['labels']))
        text = show_sample(sample, self._tokenizer, color=False).strip()
        return text if len(text) <= self._max_chars else f'{text[: self._max_chars]} … ({len(text)} characters)'
