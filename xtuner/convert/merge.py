"""Merges adapters into their base: plain weights written block by block, for models of any size."""

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
from xtuner.convert.output import atomic_folder, check_output
from xtuner.convert.prompts import choose_prompts
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.convert.source import DTYPES, MergeSource, check_changed, dtype_name, open_source, plan_tensors
from xtuner.convert.verify import LEAST_AGREEMENT, MOST_KL, Comparison, Verifier, compare
from xtuner.errors import CheckpointError, ModelError, UsageError
from xtuner.model.weights.reader import fingerprint
from xtuner.tracking.model_card import write_card
from xtuner.utils.units import gigabytes

logger = logging.getLogger('xtuner')

CHEAP_BYTES = {'cpu': 2 * 10**9, 'cuda': 40 * 10**9}
"""Model sizes up to which a merge is measured and verified by default."""


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
    """Writes a model folder with the base's weights plus the adapters' changes.

    Args:
        llm: The base model's folder or hub id.
        adapter: A peft LoRA adapter, such as a checkpoint or work folder of `xtuner train`.
        out: A missing or empty folder. It appears only once it is complete.
        weight: Factor of the adapter's change.
        more: Further adapters of the same base, with their weights; all changes are summed.
        dtype: 'fp16', 'bf16' or 'fp32'; None uses the training dtype, with float32 becoming fp16.
        base: 'original' merges into the published weights, 'dequantized' into the values that quantized training used;
            'auto' uses the published weights if they measurably preserve what was trained, else the dequantized values.
        max_shard_bytes: Maximum bytes per .safetensors file, unless a single tensor is larger.
        device: 'cpu' or 'cuda', where the products are computed.
        verify: Number of prompts on which the models are compared; None: a default if that is cheap; 0: no comparison.
        force: Whether to accept an adapter whose `xtuner.json` names another base.

    Returns:
        `out`.

    Raises:
        CheckpointError: An adapter belongs to another base, is incomplete, does not fit, or changes nothing.
        ModelError: The base cannot be read, `out` is not empty, or the result differs from base plus adapter, or (with
            'auto') from the trained model.
        UsageError: `dequantized` for an adapter trained without quantization, or an unavailable device.
    """
    check_output(out)
    source = open_source(llm, [(adapter, weight), *more], _device(device), force=force)
    trained_in = source.provenance.compute_dtype if source.provenance else 'fp16'
    dtype = dtype or ('bf16' if trained_in == 'bf16' else 'fp16')
    parts = [(part.adapter.folder, part.weight) for part in source.parts]
    try:
        plans, changes = plan_tensors(source, DTYPES[dtype])
    except CheckpointError:
        Adapted(source.reader.folder, parts)  # raises the usual error for an adapter that does not fit
        raise
    size = sum(plan.nbytes for plan in plans)
    logger.info('merging %s into %s: %s in %s', ', '.join(str(p.adapter.folder) for p in source.parts), llm,
                gigabytes(size), dtype)  # fmt: skip
    verifier = _verifier(source, plans, changes, verify, size)
    source, trained = _with_base(source, base, verifier)
    with atomic_folder(out, _job(source, plans, max_shard_bytes)) as folder:
        from xtuner.convert.folder import write_model_files  # slow imports, which an invalid call need not wait for

        example = write_model_files(folder, source.reader.folder, parts[-1][0], source.provenance,
                          changes | {'dtype': dtype_name(DTYPES[dtype])})  # fmt: skip
        write_weights(folder, plans, max_shard_bytes, source.merged)
        check_changed(source, DTYPES[dtype], len(plans))
        comparison = None
        if verifier is not None:
            written = verifier.check(folder, source.base, DTYPES[dtype])
            comparison = compare(verifier.on(trained), written) if trained else None
        _check_agreement(comparison, source, asked=base)
        _record(folder, source, comparison, example)
    return out


def _verifier(
    source: MergeSource, plans: Sequence[TensorPlan], changes: dict[str, Any], verify: int | None, size: int
) -> Verifier | None:
    """Attaches the adapters to the base, which checks that they fit; returns None if nothing is to be compared."""
    parts = [(part.adapter.folder, part.weight) for part in source.parts]
    adapted = Adapted(source.reader.folder, parts, changes)
    if verify == 0:
        return None
    if verify is None and size > CHEAP_BYTES[source.device.type]:
        logger.info('not verified against base and adapter, which reads %s several times; enable it with '
                    '--verify 4, which needs no more memory', gigabytes(size))  # fmt: skip
        return None
    vocab_size = adapted.model.config.get_text_config().vocab_size
    prompts = choose_prompts(source.reader.folder, parts[-1][0].resolve().parent, verify, vocab_size)
    return Verifier(source, plans, adapted, prompts)


def _with_base(source: MergeSource, base: str, verifier: Verifier | None) -> tuple[MergeSource, QuantizedBase | None]:
    """Returns the source with the selected base, and the quantized base used in training, if any.

    Raises:
        UsageError: The dequantized values were requested but training used none.
    """
    if source.quantization is None:
        if base == 'dequantized':
            raise UsageError(f'--base dequantized: {source.parts[-1].adapter.folder} was not trained on quantized '
                             'weights according to its xtuner.json; use --base original')  # fmt: skip
        return source, None
    bits = source.quantization.bits
    if verifier is None and base != 'dequantized':
        logger.info('base %s: not measured how well each choice preserves what was trained on the %d-bit base',
                    'dequantized' if base == 'auto' else base, bits)  # fmt: skip
    trained = source.quantized_base() if verifier is not None or base != 'original' else None
    chosen = 'dequantized' if base == 'auto' else base
    if verifier is not None and trained is not None and base != 'dequantized':
        on_original = verifier.compare_bases(trained)
        if base == 'auto' and on_original.keeps:
            chosen = 'original'
            verifier.compare_merged(trained)
    if chosen == 'original':
        logger.info('base original: the published weights, more precise than the %d-bit values used in training'
                    '', bits)  # fmt: skip
        return source, trained
    logger.info('base dequantized: the %d-bit values used in training, so that the merged model answers '
                'as it did in training', bits)  # fmt: skip
    assert trained is not None
    return replace(source, base=trained), trained


def _check_agreement(comparison: Comparison | None, source: MergeSource, *, asked: str) -> None:
    """Reports how close the written model is to the trained one.

    Raises:
        ModelError: It differs too much, and the base was not named explicitly.
    """
    if comparison is None:
        return
    kind = _kind(source)
    if comparison.keeps:
        logger.info('same as trained: merged with --base %s, %s', kind, comparison)
        return
    text = (f'merged with --base {kind}, the model differs from the trained one: {comparison} at '
            f'{comparison.positions} positions; required: {100 * LEAST_AGREEMENT:g} %, KL {MOST_KL:g}')  # fmt: skip
    if asked == 'auto':
        raise ModelError(f'{text}; the output was removed: try --dtype fp32, or force it with --base {kind}')
    logger.warning('%s; it may not preserve what was trained (--base auto chooses by this measure)', text)


def _record(folder: Path, source: MergeSource, comparison: Comparison | None, example: str) -> None:
    """Records the base and the agreement with the trained model in `xtuner.json` and the model card."""
    if source.provenance is None:
        return
    measured = {} if comparison is None else {key: asdict(comparison)[key] for key in ('agreement', 'kl', 'positions')}
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
