"""Reads, maps and encodes every record of a config's sources and collects all errors instead of stopping at one."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import numpy as np

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.dataset.packing.pack import pack_samples
from xtuner.dataset.packing.split import content_hash, split_samples
from xtuner.dataset.prepare import encode_source, encoder_of
from xtuner.dataset.sources.source import open_sources, with_progress
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template


class TrainingPart:
    """Lengths of the conversations that would be trained, from which the number of training steps follows."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._lengths, self._hashes = array('q'), array('Q')
        self._bounds, self._weights = [0], array('d')

    def add(self, sample: Sample) -> None:
        """Adds a conversation of the current source."""
        self._lengths.append(len(sample.input_ids))
        if self._config.val_ratio:
            self._hashes.append(content_hash(sample))

    def end_source(self, weight: float) -> None:
        """Marks the end of a source."""
        self._bounds.append(len(self._lengths))
        self._weights.append(weight)

    def sizes(self) -> tuple[int, int]:
        """Returns the number of packs and of conversations in the training part, as preparation would build them."""
        config = self._config
        parts = split_samples(self._bounds, weights=self._weights, hashes=self._hashes, val_ratio=config.val_ratio)
        lengths = np.asarray(self._lengths, dtype=np.int64)[parts['train']]
        return len(pack_samples(lengths, config.max_length, packing=config.packing)), len(lengths)


def check_dataset(
    config: DatasetConfig,
    *,
    tokenizer: Any,
    template: Template,
    most_examples: int = 20,
    training: TrainingPart | None = None,
) -> Summary:
    """Processes all records and returns their summary; writes nothing.

    Args:
        config: The `dataset` section; `on_bad_record` and `on_long='error'` count errors here instead of raising.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        most_examples: Number of examples kept for each kind of error.
        training: Collects the lengths of what would be trained.

    Raises:
        ConfigError: The map function does not exist, or the format of the first record is unknown.
        DataError: A file cannot be opened, or is damaged so that the rest of it cannot be read.
    """
    on_long = 'drop' if config.on_long == 'error' else config.on_long
    config = replace(config, on_bad_record='skip', on_long=on_long)
    summary = Summary(most_examples=most_examples)
    encoder = encoder_of(config, tokenizer, template)
    for spec in (config.source, config.val_file):
        for source in open_sources(spec) if spec is not None else ():
            with with_progress(source) as read:
                for chunk in encode_source(read, config, encoder=encoder, summary=summary):
                    if training is not None and spec is config.source:
                        for _, sample in chunk:
                            training.add(sample)
            if training is not None and spec is config.source:
                training.end_source(source.weight)
    return summary
