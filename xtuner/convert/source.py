"""Inputs of a merge: the base, the adapters, and the plan for each tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.adapters.attach import Provenance, check_template
from xtuner.adapters.combine import Weighted, combine, merged_shape
from xtuner.adapters.delta import Rows
from xtuner.adapters.file import AdapterFile
from xtuner.adapters.load import check_adapter
from xtuner.config.schema import QuantizationConfig
from xtuner.convert.base import PublishedBase, QuantizedBase, shared_tensors
from xtuner.convert.shards import TensorPlan
from xtuner.errors import CheckpointError, ModelError, first_of
from xtuner.model.hub import read_json, resolve_model
from xtuner.model.run_folder import resolve_checkpoint
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import WeightReader, fingerprint, open_weights

logger = logging.getLogger('xtuner')

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


@dataclass(frozen=True)
class MergeSource:
    """Inputs of a merge.

    Attributes:
        reader: The published weights.
        base: The weights that the adapters are added to.
        parts: The adapters.
        provenance: The last adapter's `xtuner.json`, or None.
        ties: For each tied tensor, the name under which its values are stored.
        device: Where blocks are computed.
        written: Adapted tensors that `merged` has completed in this run, excluding those of an interrupted run.
        unchanged: Those of them whose values did not change.
    """

    reader: WeightReader
    base: PublishedBase | QuantizedBase
    parts: tuple[Weighted, ...]
    provenance: Provenance | None
    ties: dict[str, str]
    device: torch.device
    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    @property
    def targets(self) -> set[str]:
        """Names of all tensors that an adapter changes."""
        return set().union(*(part.adapter.targets for part in self.parts))

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How training quantized the base; None: unquantized or unknown."""
        settings = self.provenance.quantization if self.provenance else None
        return None if settings is None else QuantizationConfig(**settings)

    def quantized_base(self) -> QuantizedBase:
        """The base as training quantized it."""
        assert self.provenance is not None and self.quantization is not None
        return QuantizedBase(self.reader, self.quantization, DTYPES[self.provenance.compute_dtype], self.device)

    def rows(self, name: str) -> Rows:
        """Opens a tensor's rows in `base`; a tied tensor that is written separately gets the stored values."""
        return self.base.open(self.ties.get(name, name))

    def merged(self, plan: TensorPlan) -> Iterator[Tensor]:
        """Yields a planned tensor's merged blocks, in its dtype, on the CPU.

        Raises:
            ModelError: A value is too large for the dtype.
        """
        rows = self.rows(plan.name)
        if plan.name not in self.targets:
            for start, stop in row_blocks(plan.shape):
                yield plan.cast(rows(start, stop)).cpu()
            return
        scratch = torch.empty(0, device=self.device)

        def in_float(rows: Tensor) -> Tensor:  # reuses one buffer, since allocation costs more than the products
            """Rows as float32, valid until the next call."""
            return scratch.resize_(rows.shape).copy_(rows)

        combined = combine(self.parts, plan.name, lambda a, b: in_float(rows(a, b)), plan.shape)
        adapters = [part.adapter for part in self.parts if plan.name in part.adapter.targets]
        changed = all(adapter.may_be_unchanged(plan.name) for adapter in adapters)
        for start, stop in row_blocks(plan.shape):
            before = rows(start, stop)
            merged = combined.rows(in_float(before), start, stop)
            block = merged.clone() if merged.dtype == plan.dtype else plan.cast(merged)
            changed = changed or before.shape != block.shape or not torch.equal(block, before.to(block))
            yield block.cpu()
        self.written.append(plan.name)
        if not changed:
            self.unchanged.append(plan.name)


def open_source(llm: str, adapters: Sequence[tuple[Path, float]], device: torch.device, *, force: bool) -> MergeSource:
    """Opens base and adapters, with the published weights as the initial base.

    Raises:
        ModelError: The base cannot be read, or is stored quantized.
        CheckpointError: An adapter cannot be read, or belongs to another base (unless `force`).
    """
    folder = resolve_model(llm)
    _check_unquantized(folder)
    reader = open_weights(folder)
    digest = fingerprint(reader)
    parts = []
    for path, weight in adapters:
        path = resolve_checkpoint(path)
        provenance = check_adapter(path, None if force else digest)
        check_template(provenance, path)
        parts.append(Weighted(AdapterFile(path, device), weight))
    return MergeSource(reader, PublishedBase(reader), tuple(parts), provenance, shared_tensors(folder), device)


def _check_unquantized(folder: Path) -> None:
    """Raises ModelError if the stored weights are quantized, since changes cannot be added to their codes."""
    config = folder / 'config.json'
    settings = read_json(config).get('quantization_config') if config.is_file() else None
    if not settings:
        return
    kind = settings.get('quant_method', 'an unknown form') if isinstance(settings, dict) else 'an unknown form'
    raise ModelError(f'{folder} is stored quantized ({str(kind)[:40]}), but a merge needs float weights; name the '
                     'unquantized model that it was made from')  # fmt: skip


def plan_tensors(source: MergeSource, dtype: torch.dtype) -> tuple[list[TensorPlan], dict[str, Any]]:
    """Plans the tensors to write, in the order of the base's files, and the config fields that change.

    Raises:
        CheckpointError: An adapter does not fit the base, or changes nothing.
    """
    names = source.reader.names()
    changes: dict[str, Any] = {}
    touched = source.targets & (source.ties.keys() | set(source.ties.values()))
    if touched and not all(p.adapter.keeps_ties for p in source.parts if p.adapter.targets & touched):
        names += source.ties
        changes['tie_word_embeddings'] = False
        logger.info('the model ties %s, but the adapter changes only %s: untying them in the merged model',
                    ', '.join(f'{a} with {b}' for a, b in source.ties.items()), ', '.join(sorted(touched)))  # fmt: skip
    for part in source.parts:
        present = set(names) | (source.ties.keys() if part.adapter.keeps_ties else set())
        if missing := sorted(part.adapter.targets - present):
            raise CheckpointError(f'{part.adapter.folder} changes {first_of(missing)}, which '
                                  f'{source.reader.folder} does not have')  # fmt: skip
        part.adapter.check_pairs()
        _check_trained(part.adapter)
    plans = []
    for name in names:
        stored = source.ties.get(name, name)
        shape_in_base, dtype_in_base = source.reader.shape(stored), source.reader.dtype(stored)
        shape = merged_shape(source.parts, name, shape_in_base) if name in source.targets else shape_in_base
        plans.append(TensorPlan(name, shape, dtype if dtype_in_base.is_floating_point else dtype_in_base))
        if shape != shape_in_base:
            if changes.setdefault('vocab_size', shape[0]) != shape[0]:
                raise CheckpointError(f'the adapter resizes {name} to {shape[0]} tokens, and another tensor to '
                                      f'{changes["vocab_size"]}')  # fmt: skip
            logger.info('%s grows from %d to %d tokens', name, shape_in_base[0], shape[0])
    return plans, changes


def _check_trained(adapter: AdapterFile) -> None:
    """Warns about all-zero updates, such as experts that no token reached; raises if all of them are zero."""
    zero = adapter.untrained()
    if len(zero) == len(adapter.targets):
        raise CheckpointError(f'{adapter.folder} changes nothing: the update of {first_of(zero)} is all zero; it was '
                              'not trained, or not saved completely')  # fmt: skip
    if zero:
        logger.warning('%s has an all-zero update for %d of %d tensors: %s', adapter.folder,
                       len(zero), len(adapter.targets), first_of(zero))  # fmt: skip


def check_changed(source: MergeSource, dtype: torch.dtype, num_tensors: int) -> None:
    """Reports how many tensors changed, and warns about adapted tensors that did not.

    Raises:
        CheckpointError: No tensor changed.
    """
    same, before = sorted(source.unchanged), len(source.targets) - len(source.written)
    if before:
        logger.warning('an interrupted run wrote %d of the %d adapted tensors: whether they changed is '
                       'unknown; of the other %d, %d changed', before, len(source.targets), len(source.written),
                       len(source.written) - len(same))  # fmt: skip
        return
    if len(same) == len(source.targets):
        raise CheckpointError(f'in {dtype_name(dtype)} no value of {first_of(same)} changes, so the result would be '
                              'the base; the adapter was trained too little, or not at all')  # fmt: skip
    if same:
        logger.warning('in %s %d of the %d adapted tensors keep all their values: %s', dtype_name(dtype), len(same),
                       len(source.targets), first_of(same))  # fmt: skip
    logger.info('%d tensors of %d changed', len(source.targets) - len(same), num_tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as 'float16'."""
    return str(dtype).removeprefix('torch.')
