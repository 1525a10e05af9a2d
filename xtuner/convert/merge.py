"""Adapters and their base to plain weights: a block of rows at a time, whatever the model's size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner import __version__
from xtuner.config.schema import QuantizationConfig
from xtuner.convert.adapter_file import AdapterFile
from xtuner.convert.base import PublishedBase, QuantizedBase, shared_tensors
from xtuner.convert.combine import Weighted, combine, merged_shape
from xtuner.convert.delta import Rows
from xtuner.convert.output import check_output, whole_folder
from xtuner.convert.shards import TensorPlan, row_blocks, size_text, write_weights
from xtuner.errors import CheckpointError, UsageError
from xtuner.model.adapter import Provenance, check_adapter
from xtuner.model.sources import resolve_model
from xtuner.model.weights import WeightReader, fingerprint, open_weights

logger = logging.getLogger('xtuner')

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
BASES = ('original', 'dequantized')
DEFAULT_PROMPTS = 4
CHEAP_BYTES = {'cpu': 2 * 10**9, 'cuda': 40 * 10**9}
"""Sizes of models that are verified without being asked for."""


@dataclass(frozen=True)
class Source:
    """Everything a merge reads.

    Attributes:
        reader: The published weights.
        base: What the adapters are added to.
        parts: The adapters.
        provenance: What the last adapter's `xtuner.json` says, or None.
        ties: For each tensor that the model shares, the name under which its values are stored.
        device: Where blocks are computed.
    """

    reader: WeightReader
    base: PublishedBase | QuantizedBase
    parts: tuple[Weighted, ...]
    provenance: Provenance | None
    ties: dict[str, str]
    device: torch.device

    @property
    def targets(self) -> set[str]:
        """Names of all tensors that an adapter changes."""
        return set().union(*(part.adapter.targets for part in self.parts))

    def rows(self, name: str) -> Rows:
        """What training saw, or what was published, of a tensor; a shared one that is written apart has its twin's."""
        return self.base.open(self.ties.get(name, name))

    def merged(self, plan: TensorPlan) -> Iterator[Tensor]:
        """A planned tensor's blocks, in its dtype, on the CPU.

        Raises:
            CheckpointError: adapters name the tensor and do not change it.
            ModelError: a value is too large for the dtype.
        """
        rows = self.rows(plan.name)
        if plan.name not in self.targets:
            for start, stop in row_blocks(plan.shape):
                yield plan.cast(rows(start, stop)).cpu()
            return
        scratch = torch.empty(0, device=self.device)

        def in_float(rows: Tensor) -> Tensor:  # into one and the same buffer: fresh memory costs more than the products
            """Rows as float32, until the next call."""
            return scratch.resize_(rows.shape).copy_(rows)

        combined = combine(self.parts, plan.name, lambda a, b: in_float(rows(a, b)), plan.shape)
        changed = all(part.adapter.carried(plan.name) for part in self.parts if plan.name in part.adapter.targets)
        for start, stop in row_blocks(plan.shape):
            before = rows(start, stop)
            merged = combined.rows(in_float(before), start, stop)
            block = merged.clone() if merged.dtype == plan.dtype else plan.cast(merged)
            changed = changed or before.shape != block.shape or not torch.equal(block, before.to(block))
            yield block.cpu()
        if not changed:
            raise CheckpointError(
                f'the adapter names {plan.name}, but in {_short(plan.dtype)} no value of it changes; it was '
                'trained too little, or not at all'
            )


def merge(
    llm: str,
    adapter: Path,
    out: Path,
    *,
    weight: float = 1.0,
    more: Sequence[tuple[Path, float]] = (),
    dtype: str | None = None,
    base: str = 'original',
    max_shard_bytes: int = 2 * 10**9,
    device: str = 'cpu',
    verify: int | None = None,
    force: bool = False,
) -> Path:
    """Writes a model folder whose weights are a base's plus the adapters'.

    Args:
        llm: The base model's folder or hub id.
        adapter: A peft LoRA adapter, such as a checkpoint of `xtuner train`.
        out: A folder that is missing or empty. It appears as a whole at the end.
        weight: How much of the adapter's change is taken.
        more: Further adapters of the same base, with their weights; the changes are added up.
        dtype: 'fp16', 'bf16' or 'fp32'; None takes what the adapter was trained in, float32 training becoming fp16.
        base: 'original' adds to the published weights, 'dequantized' to the values that quantised training saw.
        max_shard_bytes: Most bytes of one .safetensors file, unless one tensor alone is larger.
        device: 'cpu' or 'cuda', where the products are computed.
        verify: Prompts on which the written model is compared with base and adapter; None: `DEFAULT_PROMPTS` where
            that is cheap.
        force: Takes an adapter whose `xtuner.json` names another base.

    Returns:
        `out`.

    Raises:
        CheckpointError: an adapter of another base, one that adapts tensors the base has not, or changes nothing.
        ModelError: the base cannot be read, `out` is not empty, or the result differs from base and adapter.
        UsageError: `dequantized` where training saw no quantised weights, or a device that is not there.
    """
    check_output(out)
    source = _open(llm, [(adapter, weight), *more], base, _device(device), force)
    trained_in = source.provenance.compute_dtype if source.provenance else 'fp16'
    dtype = dtype or ('bf16' if trained_in == 'bf16' else 'fp16')
    plans, config_changes = plan_tensors(source, DTYPES[dtype])
    size = sum(plan.nbytes for plan in plans)
    logger.info('merging %s into %s: %s in %s', ', '.join(str(p.adapter.folder) for p in source.parts), llm,
                size_text(size), dtype)  # fmt: skip
    _explain(base, source.provenance)
    num_prompts = _num_prompts(verify, size, source)
    with whole_folder(out, _job(source, plans, base, max_shard_bytes)) as folder:
        write_weights(folder, plans, max_shard_bytes, source.merged)
        logger.info('%d tensors of %d changed', len(source.targets), len(plans))
        from xtuner.convert.folder import write_model_files  # imports what the weights do not wait for

        write_model_files(folder, source.reader.folder, source.parts[-1].adapter.folder, source.provenance,
                          config_changes | {'dtype': _short(DTYPES[dtype])})  # fmt: skip
        if num_prompts:
            from xtuner.convert.verify import verify_merge

            verify_merge(source.reader.folder, source.rows, source.parts, folder, num_prompts, DTYPES[dtype],
                         source.device)  # fmt: skip
    return out


def plan_tensors(source: Source, dtype: torch.dtype) -> tuple[list[TensorPlan], dict[str, Any]]:
    """What will be written, and which fields of the config change with it.

    Raises:
        CheckpointError: an adapter changes tensors that the base has not, or does not fit them.
    """
    names = [name for name in source.reader.names() if name not in source.ties]
    changes: dict[str, Any] = {}
    touched = source.targets & (source.ties.keys() | set(source.ties.values()))
    if touched and not all(p.adapter.keeps_ties for p in source.parts if p.adapter.targets & touched):
        names += source.ties
        changes['tie_word_embeddings'] = False
        logger.info('the model shares %s, and the adapter changes only %s: the merged model has both',
                    ', '.join(f'{a} with {b}' for a, b in source.ties.items()), ', '.join(sorted(touched)))  # fmt: skip
    for part in source.parts:
        known = set(names) | (source.ties.keys() if part.adapter.keeps_ties else set())
        if missing := sorted(part.adapter.targets - known):
            more = f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''
            raise CheckpointError(f'{part.adapter.folder} changes {missing[0]}{more}, which '
                                  f'{source.reader.folder} has not; nothing of an adapter is left out')  # fmt: skip
        if zero := part.adapter.untrained():
            more = f' and {len(zero) - 1} more tensors' if len(zero) > 1 else ''
            raise CheckpointError(f'{part.adapter.folder} changes nothing in {zero[0]}{more}: its update is all zero; '
                                  'it was not trained, or not saved whole')  # fmt: skip
    plans = []
    for name in names:
        stored = source.ties.get(name, name)
        before, own = source.reader.shape(stored), source.reader.dtype(stored)
        shape = merged_shape(source.parts, name, before) if name in source.targets else before
        plans.append(TensorPlan(name, shape, dtype if own.is_floating_point else own))
        if shape != before:
            if changes.setdefault('vocab_size', shape[0]) != shape[0]:
                raise CheckpointError(f'the adapter resizes {name} to {shape[0]} words, and another tensor to '
                                      f'{changes["vocab_size"]}')  # fmt: skip
            logger.info('%s grows from %d to %d words', name, before[0], shape[0])
    return plans, changes


def _open(llm: str, adapters: Sequence[tuple[Path, float]], base: str, device: torch.device, force: bool) -> Source:
    folder = resolve_model(llm)
    reader = open_weights(folder)
    digest = fingerprint(reader)
    parts = []
    for path, weight in adapters:
        provenance = check_adapter(path, None if force else digest)
        parts.append(Weighted(AdapterFile(path, device), weight))
    weights: PublishedBase | QuantizedBase = PublishedBase(reader)
    if base == 'dequantized':
        if provenance is None or provenance.quantization is None:
            raise UsageError(f'--base dequantized: {adapters[-1][0]} was not trained on quantised weights, as far as '
                             'its xtuner.json says; use --base original')  # fmt: skip
        weights = QuantizedBase(reader, QuantizationConfig(**provenance.quantization),
                                {'fp16': torch.float16, **DTYPES}[provenance.compute_dtype], device)  # fmt: skip
    return Source(reader, weights, tuple(parts), provenance, shared_tensors(folder), device)


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: torch sees no CUDA device here; use --device cpu')
    return torch.device(name)


def _explain(base: str, provenance: Provenance | None) -> None:
    """One line on what the adapter is added to, where there is a choice."""
    if provenance is None or provenance.quantization is None:
        return
    bits = provenance.quantization.get('bits', 4)
    if base == 'original':
        logger.info('base original: the published weights, finer than the %d-bit values that the adapter was trained '
                    'on; --base dequantized takes those, and stays closer to what training saw', bits)  # fmt: skip
    else:
        logger.info('base dequantized: the %d-bit values that training saw, so that the merged model answers as it did '
                    'in training; --base original takes the finer published weights', bits)  # fmt: skip


def _num_prompts(verify: int | None, size: int, source: Source) -> int:
    if verify is not None:
        return verify
    if size <= CHEAP_BYTES[source.device.type]:
        return DEFAULT_PROMPTS
    logger.info('not verified: it would read %.1f GB twice; --verify %d does it, in the same memory',
                size / 1e9, DEFAULT_PROMPTS)  # fmt: skip
    return 0


def _job(source: Source, plans: Sequence[TensorPlan], base: str, max_shard_bytes: int) -> dict[str, Any]:
    return {
        'xtuner': __version__, 'torch': torch.__version__, 'device': str(source.device), 'base': base,
        'weights': fingerprint(source.reader), 'max_shard_bytes': max_shard_bytes,
        'adapters': [(part.adapter.fingerprint(), part.weight) for part in source.parts],
        'tensors': [(plan.name, plan.shape, str(plan.dtype)) for plan in plans],
    }  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
