"""Prepares a config's `dataset` section as packs: sources, map functions, encoding, length, packing, cache."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.cache.build_once import build_once, cache_root
from xtuner.dataset.cache.fingerprint import digest, fingerprint_code, fingerprint_tokenizer
from xtuner.dataset.cache.function_hash import fingerprint_function
from xtuner.dataset.cache.store import PreparedDataset, StoreWriter, is_complete
from xtuner.dataset.conversation import Conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, Sample
from xtuner.dataset.encode.length import fit_length, num_targets
from xtuner.dataset.map_fns import formats, resolve_map_fn
from xtuner.dataset.mapping.map_records import map_records, stopped_by
from xtuner.dataset.packing.pack import Packs, pack_samples
from xtuner.dataset.packing.split import split_samples
from xtuner.dataset.sources.source import Source, open_sources, with_progress
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template
from xtuner.errors import ConfigError, DataError
from xtuner.ranks import is_first_process
from xtuner.utils.units import counted

logger = logging.getLogger('xtuner')

_T = TypeVar('_T')
_CHUNK_CONVERSATIONS, _CHUNK_CHARACTERS = 2048, 2**21  # encoded at a time: bounds memory and keeps all cores busy


def prepare_dataset(
    config: DatasetConfig, *, tokenizer: Any, template: Template, part: str = 'train'
) -> PreparedDataset | None:
    """Returns the packs of a config, prepared now or loaded from the cache.

    Call it on every rank, outside any collective: one process prepares the data, the others wait for its files.

    Args:
        config: The `dataset` section.
        tokenizer: A transformers tokenizer.
        template: The prompt format, from `get_template`.
        part: 'train', or 'val' for the validation part.

    Returns:
        The packs; None for 'val' if the config has no validation data.

    Raises:
        ConfigError: Values of the section are invalid or conflict.
        DataError: A bad record under `on_bad_record='error'`, a long one under `on_long='error'`, more dropped
            conversations than `max_dropped`, or none left.
    """
    _check(config)
    part_name = part
    train_folder = None
    if part == 'val' and config.val_file is not None:
        train_folder = prepared_folder(config, tokenizer=tokenizer, template=template)
        config, part = replace(config, source=config.val_file, val_file=None), 'train'
    elif part == 'val' and not config.val_ratio:
        return None
    folder = prepared_folder(config, tokenizer=tokenizer, template=template)
    try:
        built = build_once(
            folder,
            lambda to: _build(to, config, tokenizer, template),
            is_complete=is_complete,
            waiting=lambda holder: _say(f'waiting for {holder} to prepare {folder}'),
        )
    except OSError as error:
        raise DataError(f'cannot write prepared data to {folder}: {error.strerror or error}; free some space, or '
                        'name another folder with dataset.cache_dir or XTUNER_CACHE') from error  # fmt: skip
    dataset = PreparedDataset(folder, part)
    packs = f'{part_name}: {counted(len(dataset), "pack")}, {dataset.packing_efficiency(config.max_length):.1%} full'
    # Dropped records must show even where no logging is configured.
    level = logging.WARNING if dataset.summary.counts else logging.INFO
    _say(f'{"prepared in" if built else "loaded from"} {folder}', packs, *dataset.summary.lines(), level=level)
    if train_folder is not None and is_first_process():
        _warn_about_leakage(dataset, train_folder)
    return dataset


def _check(config: DatasetConfig) -> None:
    """Raises ConfigError for values that conflict."""
    if config.val_file is not None and config.val_ratio:
        raise ConfigError('`dataset.val_file` and `dataset.val_ratio` are both set; set one of them')
    if config.group_by_length and config.packing != 'none':
        raise ConfigError(f"`dataset.group_by_length` needs `dataset.packing = 'none'`, got {config.packing!r}: packs "
                          'already have one length')  # fmt: skip
    if config.val_ratio >= 1:
        raise ConfigError(f'`dataset.val_ratio` must be below 1, got {config.val_ratio}')


def prepared_folder(config: DatasetConfig, *, tokenizer: Any, template: Template) -> Path:
    """Returns the cache folder of a config's prepared data, named by a hash of everything that affects the tokens."""
    sources = open_sources(config.source)
    maps = [source.map_fn or config.map_fn for source in sources]
    template = template.allowing(config.special_tokens_in_answers, tokenizer)
    parts = (
        fingerprint_code(), tokenizers.__version__,
        fingerprint_tokenizer(tokenizer), fingerprint_function(type(tokenizer)),
        template.fingerprint(), _fingerprint_class(template),
        [(source.fingerprint(), source.weight) for source in sources],
        [[fingerprint_function(each) for each in ([resolve_map_fn(fn)] if fn is not None else formats().values())]
         for fn in maps],
        config.max_length, config.on_long, config.on_bad_record, config.max_dropped, config.train_on, config.packing,
        config.val_ratio, config.unique_id, sorted(config.ignore),
    )  # fmt: skip
    return cache_root(config.cache_dir) / 'datasets' / digest(parts)


def _fingerprint_class(template: Template) -> str:
    """Hash of the template's class; for a user's class also of its fields, which its `fingerprint` may lack."""
    cls = type(template)
    built_in = cls.__module__.startswith('xtuner.')
    fields = {} if built_in else {name: value for name, value in vars(template).items() if not name.startswith('_')}
    return fingerprint_function((cls, fields))


def encoder_of(config: DatasetConfig, tokenizer: Any, template: Template) -> Encoder:
    """Returns the encoder for a `dataset` section."""
    template = template.allowing(config.special_tokens_in_answers, tokenizer)
    return Encoder(tokenizer, template, train_on=config.train_on)


def encode_source(
    source: Source, config: DatasetConfig, *, encoder: Encoder, summary: Summary
) -> Iterator[list[tuple[Conversation, Sample]]]:
    """Yields the conversations of a source with their tokens, in chunks; counts dropped and truncated ones."""
    chunks = _chunks(map_records(source, config, summary, encoder.template))
    with ThreadPoolExecutor(max_workers=1) as pool:  # reads and maps the next chunk while this one is encoded
        waiting: deque[Future[list[tuple[Conversation, Sample | DataError]]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk, encoder, config))
            if len(waiting) > 1:
                yield _count_spelled(
                    _fit_lengths(waiting.popleft().result(), encoder.begin_id, config, summary), encoder, summary
                )
        while waiting:
            yield _count_spelled(
                _fit_lengths(waiting.popleft().result(), encoder.begin_id, config, summary), encoder, summary
            )


def _count_spelled(
    chunk: list[tuple[Conversation, Sample]], encoder: Encoder, summary: Summary
) -> list[tuple[Conversation, Sample]]:
    """Counts the conversations whose answers contain special tokens as text."""
    for conversation, _ in chunk:
        for name in encoder.spelt(conversation):
            summary.spelt[name] = summary.spelt.get(name, 0) + 1
    return chunk


def _fit_lengths(
    encoded: list[tuple[Conversation, Sample | DataError]],
    begin_id: int | None,
    config: DatasetConfig,
    summary: Summary,
) -> list[tuple[Conversation, Sample]]:
    """Applies `on_long`, drops samples without targets, and counts; only this thread updates the summary."""
    kept = []
    for conversation, sample in encoded:
        if isinstance(sample, DataError):
            if config.on_bad_record == 'error':
                raise stopped_by(sample) from None
            summary.record_drop('bad', str(sample))
            continue
        fitted = fit_length(sample, config.max_length, on_long=config.on_long, origin=conversation.origin,
                            begin_id=begin_id)  # fmt: skip
        if fitted is None:
            summary.record_drop('too_long', f'{conversation.origin} ({len(sample.input_ids)} tokens)')
            continue
        targets = num_targets(fitted)
        if not targets:
            summary.record_drop('without_target', conversation.origin)
            continue
        if fitted is not sample:
            summary.record_drop('cut', f'{conversation.origin} ({len(sample.input_ids)} tokens)')
        summary.kept += 1
        summary.tokens += len(fitted.input_ids)
        summary.target_tokens += targets
        kept.append((conversation, fitted))
    return kept


def _encode_chunk(
    chunk: list[Conversation], encoder: Encoder, config: DatasetConfig
) -> list[tuple[Conversation, Sample | DataError]]:
    """Encodes a chunk; a conversation that cannot be encoded yields its error, after which encoding may stop."""
    stop = config.on_bad_record == 'error'
    return list(zip(chunk, encoder.encode_each(chunk, stop=stop), strict=not stop))


def _chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        chunk.append(conversation)
        characters += sum(len(message.content) for message in conversation.messages)
        if len(chunk) >= _CHUNK_CONVERSATIONS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _build(folder: Path, config: DatasetConfig, tokenizer: Any, template: Template) -> None:
    started = time.monotonic()
    summary = Summary()
    encoder = encoder_of(config, tokenizer, template)
    writer = StoreWriter(folder)
    bounds = [0]
    sources = open_sources(config.source)
    try:
        for source in sources:
            with with_progress(source) as read:
                for chunk in _without_gc(encode_source(read, config, encoder=encoder, summary=summary)):
                    writer.append([sample for _, sample in chunk], [conversation.origin for conversation, _ in chunk])
            bounds.append(writer.num_samples)
        check_dropped(summary, config)
        parts = split_samples(bounds, weights=[source.weight for source in sources], hashes=writer.hashes,
                              val_ratio=config.val_ratio)  # fmt: skip
        packs = {name: _packed(numbers, writer.lengths, config) for name, numbers in parts.items()}
        summary.seconds = time.monotonic() - started
        writer.finish(packs, summary)
    finally:
        writer.close()


def _without_gc(chunks: Iterable[_T]) -> Iterator[_T]:
    """Passes chunks on with the cyclic garbage collector disabled, which would traverse all objects for each chunk.

    Garbage of a chunk is collected after it, in the youngest generation only.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        for chunk in chunks:
            yield chunk
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()


def check_dropped(summary: Summary, config: DatasetConfig) -> None:
    """Raises DataError if more was dropped than `max_dropped` allows, or nothing is left."""
    total = summary.kept + summary.dropped
    if not total:
        raise DataError(f'`dataset.source` {config.source!r} contains no conversation')
    if summary.dropped > config.max_dropped * total or not summary.kept:
        raise DataError(f'{summary.dropped} of {total} conversations would be dropped, and `dataset.max_dropped` is '
                        f'{config.max_dropped:g}; ' + ' | '.join(summary.lines()))  # fmt: skip


def _packed(numbers: np.ndarray, lengths: np.ndarray, config: DatasetConfig) -> Packs:
    packs = pack_samples(lengths[numbers], config.max_length, packing=config.packing)
    return Packs(numbers[packs.samples], packs.starts)


def _warn_about_leakage(validation: PreparedDataset, train_folder: Path) -> None:
    if not is_complete(train_folder):
        _say('`dataset.val_file` is not compared with the training data, which is not fully prepared')
        return
    num_leaks = int(np.isin(validation.hashes, PreparedDataset(train_folder).hashes).sum())
    if num_leaks:
        text = (f'warning: {num_leaks} of {validation.num_samples} conversations of `dataset.val_file` are also in the '
                'training data, so the validation loss will be too low')  # fmt: skip
        _say(text, level=logging.WARNING)


def _say(*lines: str, level: int = logging.INFO) -> None:
    """Logs on the first rank only."""
    if is_first_process():
        for line in lines:
            logger.log(level, 'data: %s', line)
