"""Adapters and their base to plain weights: a block of rows at a time, whatever the model's size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from xtuner import __version__
from xtuner.convert.base import PublishedBase, QuantizedBase
from xtuner.convert.layerwise import Adapted
from xtuner.convert.output import check_output, whole_folder
from xtuner.convert.prompts import choose_prompts
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.convert.source import DTYPES, MergeSource, check_changed, open_source, plan_tensors, short
from xtuner.convert.verify import LEAST_AGREEMENT, MOST_KL, Comparison, Verifier, compare
from xtuner.errors import CheckpointError, ModelError, UsageError
from xtuner.model.weights.reader import fingerprint
from xtuner.tracking.model_card import write_card
from xtuner.utils.units import gigabytes

logger = logging.getLogger('xtuner')

CHEAP_BYTES = {'cpu': 2 * 10**9, 'cuda': 40 * 10**9}
"""Sizes of models that are measured and verified without being asked for."""


def merge(
    llm: str,
    adapter: Path,
    out: Path,
    *,
    weight: float = 1.0,
    more: Sequence[tuple[Path, float]] = (),
    dtype: str | None = None,
    base: str = 'auto',
    max_shard_bytes: int = 2 * 10**9,
    device: str = 'cpu',
    verify: int | None = None,
    force: bool = False,
) -> Path:
    """Writes a model folder whose weights are a base's plus the adapters'.

    Args:
        llm: The base model's folder or hub id.
        adapter: A peft LoRA adapter, such as a checkpoint or work folder of `xtuner train`.
        out: A folder that is missing or empty. It appears as a whole at the end.
        weight: How much of the adapter's change is taken.
        more: Further adapters of the same base, with their weights; the changes are added up.
        dtype: 'fp16', 'bf16' or 'fp32'; None takes what the adapter was trained in, float32 training becoming fp16.
        base: 'original' adds to the published weights, 'dequantized' to the values that quantised training saw;
            'auto' takes the published weights where they measurably keep what was taught, else the trained values.
        max_shard_bytes: Most bytes of one .safetensors file, unless one tensor alone is larger.
        device: 'cpu' or 'cuda', where the products are computed.
        verify: Prompts on which models are compared; None: some where that is cheap; 0: none.
        force: Takes an adapter whose `xtuner.json` names another base.

    Returns:
        `out`.

    Raises:
        CheckpointError: an adapter of another base, one that is not whole or does not fit, or changes nothing.
        ModelError: the base cannot be read, `out` is not empty, or the result differs from base and adapter, or (with
            'auto') from the model that was trained.
        UsageError: `dequantized` where training saw no quantised weights, or a device that is not there.
    """
    check_output(out)
    source = open_source(llm, [(adapter, weight), *more], _device(device), force=force)
    trained_in = source.provenance.compute_dtype if source.provenance else 'fp16'
    dtype = dtype or ('bf16' if trained_in == 'bf16' else 'fp16')
    parts = [(part.adapter.folder, part.weight) for part in source.parts]
    try:
        plans, changes = plan_tensors(source, DTYPES[dtype])
    except CheckpointError:
        Adapted(source.reader.folder, parts)  # an adapter that does not fit is told as it is everywhere
        raise
    size = sum(plan.nbytes for plan in plans)
    logger.info('merging %s into %s: %s in %s', ', '.join(str(p.adapter.folder) for p in source.parts), llm,
                gigabytes(size), dtype)  # fmt: skip
    verifier = _verifier(source, plans, changes, verify, size)
    source, trained = _with_base(source, base, verifier)
    with whole_folder(out, _job(source, plans, max_shard_bytes)) as folder:
        from xtuner.convert.folder import write_model_files  # imports what a wrong call does not wait for

        example = write_model_files(folder, source.reader.folder, parts[-1][0], source.provenance,
                          changes | {'dtype': short(DTYPES[dtype])})  # fmt: skip
        write_weights(folder, plans, max_shard_bytes, source.merged)
        check_changed(source, DTYPES[dtype], len(plans))
        found = None
        if verifier is not None:
            written = verifier.check(folder, source.base, DTYPES[dtype])
            found = compare(verifier.on(trained), written) if trained else None
        _judge(found, source, asked=base)
        _record(folder, source, found, example)
    return out


def _verifier(
    source: MergeSource, plans: Sequence[TensorPlan], changes: dict[str, Any], verify: int | None, size: int
) -> Verifier | None:
    """Attaches the adapters to the base, which shows that they fit; None where nothing shall be compared."""
    parts = [(part.adapter.folder, part.weight) for part in source.parts]
    adapted = Adapted(source.reader.folder, parts, changes)
    if verify == 0:
        return None
    if verify is None and size > CHEAP_BYTES[source.device.type]:
        logger.info('not compared with base and adapter: it would read %s several times; --verify 4 does it, in '
                    'the same memory', gigabytes(size))  # fmt: skip
        return None
    vocab_size = adapted.model.config.get_text_config().vocab_size
    prompts = choose_prompts(source.reader.folder, parts[-1][0].resolve().parent, verify, vocab_size)
    return Verifier(source, plans, adapted, prompts)


def _with_base(source: MergeSource, base: str, verifier: Verifier | None) -> tuple[MergeSource, QuantizedBase | None]:
    """The source with the base that was asked for or is chosen, and the base that training held quantised, if it did.

    Raises:
        UsageError: the trained values are asked for and there are none.
    """
    if source.quantization is None:
        if base == 'dequantized':
            raise UsageError(f'--base dequantized: {source.parts[-1].adapter.folder} was not trained on quantised '
                             'weights, as far as its xtuner.json says; use --base original')  # fmt: skip
        return source, None
    bits = source.quantization.bits
    if verifier is None and base != 'dequantized':
        logger.info('base %s: not measured here how much of what was taught on the %d-bit base each choice keeps',
                    'dequantized' if base == 'auto' else base, bits)  # fmt: skip
    trained = source.quantized_base() if verifier is not None or base != 'original' else None
    chosen = 'dequantized' if base == 'auto' else base
    if verifier is not None and trained is not None and base != 'dequantized':
        on_original = verifier.compare_bases(trained)
        if base == 'auto' and on_original.keeps:
            chosen = 'original'
            verifier.compare_merged(trained)
    if chosen == 'original':
        logger.info('base original: the published weights, finer than the %d-bit values that the adapter was trained '
                    'on', bits)  # fmt: skip
        return source, trained
    logger.info('base dequantized: the %d-bit values that the adapter was trained on, so that the merged model answers '
                'as it did in training', bits)  # fmt: skip
    assert trained is not None
    return replace(source, base=trained), trained


def _judge(found: Comparison | None, source: MergeSource, *, asked: str) -> None:
    """Says how near the written model is to the trained one.

    Raises:
        ModelError: too far, and the base was not asked for by name.
    """
    if found is None:
        return
    kind = _kind(source)
    if found.keeps:
        logger.info('as trained: merged with --base %s, %s', kind, found)
        return
    text = (f'merged with --base {kind}, the model differs from the one that was trained: {found} of {found.positions} '
            f'positions, where {100 * LEAST_AGREEMENT:g} % and at most {MOST_KL:g} are asked for')  # fmt: skip
    if asked == 'auto':
        raise ModelError(f'{text}; nothing was left: try --dtype fp32, or name a base (--base {kind}) to have it')
    logger.warning('%s; it may not keep what was taught (--base auto chooses by this measure)', text)


def _record(folder: Path, source: MergeSource, found: Comparison | None, example: str) -> None:
    """Notes in `xtuner.json` and the card which base the model was merged on, and how near it is to the trained one."""
    if source.provenance is None:
        return
    measured = {} if found is None else {key: asdict(found)[key] for key in ('agreement', 'kl', 'positions')}
    provenance = replace(source.provenance, merged={'base': _kind(source), **measured})
    provenance.write(folder)
    write_card(folder, provenance, kind='merged', example=example)


def _kind(source: MergeSource) -> str:
    return 'original' if isinstance(source.base, PublishedBase) else 'dequantized'


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: torch sees no CUDA device here; use --device cpu')
    return torch.device(name)


def _job(source: MergeSource, plans: Sequence[TensorPlan], max_shard_bytes: int) -> dict[str, Any]:
    return {
        'xtuner': __version__, 'torch': torch.__version__, 'device': str(source.device), 'base': _kind(source),
        'weights': fingerprint(source.reader), 'max_shard_bytes': max_shard_bytes,
        'adapters': [(part.adapter.fingerprint(), part.weight) for part in source.parts],
        'tensors': [(plan.name, plan.shape, str(plan.dtype)) for plan in plans],
    }  # fmt: skip
