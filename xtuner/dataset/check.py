"""Reads, maps and encodes every record of a config's sources, and collects what is wrong instead of stopping at it."""

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
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template


class TrainingPart:
    """The sizes of the conversations that would be trained, from which the steps of a run follow."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._lengths, self._hashes = array('q'), array('Q')
        self._bounds, self._weights = [0], array('d')

    def add(self, sample: Sample) -> None:
        """Notes a conversation of the source under way."""
        self._lengths.append(len(sample.input_ids))
        if self._config.val_ratio:
            self._hashes.append(content_hash(sample))

    def end_source(self, weight: float) -> None:
        """Ends a source."""
        self._bounds.append(len(self._lengths))
        self._weights.append(weight)

    def sizes(self) -> tuple[int, int]:
        """Packs and conversations of the training part, as preparation would make them."""
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
    """Returns what would become of the records; nothing is written.

    Args:
        config: The `dataset` section; its `on_bad_record` and `on_long='error'` are taken as counting, not stopping.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        most_examples: How many faults of a kind are kept.
        training: Collects the sizes of what would be trained.

    Raises:
        ConfigError: Where the map function does not exist, or the format of the first record is not known.
        DataError: Where a file cannot be opened, or is broken in a way that hides what follows.
    """
    on_long = 'drop' if config.on_long == 'error' else config.on_long
    config = replace(config, on_bad_record='skip', on_long=on_long)
    summary = Summary(most_examples=most_examples)
    encoder = encoder_of(config, tokenizer, template)
    for spec in (config.source, config.val_file):
        for source in open_sources(spec) if spec is not None else ():
            for chunk in encode_source(source, config, encoder=encoder, summary=summary):
                if training is not None and spec is config.source:
                    for _, sample in chunk:
                        training.add(sample)
            if training is not None and spec is config.source:
                training.end_source(source.weight)
    return summary
