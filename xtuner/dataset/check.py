"""Reads, maps and encodes every record of a config's sources, and collects what is wrong instead of stopping at it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.pipeline import encode_source, encoder_of
from xtuner.dataset.prompt import Template
from xtuner.dataset.sources import open_sources
from xtuner.dataset.summary import Summary


def check_dataset(config: DatasetConfig, *, tokenizer: Any, template: Template, most_examples: int = 20) -> Summary:
    """Returns what would become of the records; nothing is written.

    Args:
        config: The `dataset` section; its `on_bad_record` and `on_long='error'` are taken as counting, not stopping.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        most_examples: How many faults of a kind are kept.

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
            for _ in encode_source(source, config, encoder=encoder, summary=summary):
                pass
    return summary
