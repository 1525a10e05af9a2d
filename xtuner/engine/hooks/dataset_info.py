"""Shows what the model is about to see."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.hooks import Hook

from xtuner.dataset.show import printable
from xtuner.dataset.tokenize import IGNORE_INDEX

logger = logging.getLogger('xtuner')


class DatasetInfoHook(Hook):
    """Prints the first item's text, trained parts in brackets, before training.

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
        logger.info('first item, trained text in [[ ]]:\n%s', self.preview(next(iter(self._dataset))))

    def preview(self, item: dict[str, Any]) -> str:
        """The item's text, each run of trained tokens between `[[` and `]]`, cut at `max_chars`."""
        pieces: list[str] = []
        ids, trained = [int(i) for i in item['input_ids']], [int(label) != IGNORE_INDEX for label in item['labels']]
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or trained[end] != trained[start]:
                text = self._tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
                pieces.append(f'[[{text}]]' if trained[start] else text)
                start = end
        text = printable(''.join(pieces))
        return text if len(text) <= self._max_chars else f'{text[: self._max_chars]} … ({len(text)} characters)'
