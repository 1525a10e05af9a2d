"""Everything a merge reads: the base, the adapters, and what becomes of each tensor."""

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
from xtuner.errors import CheckpointError, ModelError
from xtuner.model.hub import read_json, resolve_model
from xtuner.model.run_folder import resolve_checkpoint
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import WeightReader, fingerprint, open_weights

logger = logging.getLogger('xtuner')

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


@dataclass(frozen=True)
class MergeSource:
    """Everything a merge reads.

    Attributes:
        reader: The published weights.
        base: What the adapters are added to.
        parts: The adapters.
        provenance: What the last adapter's `xtuner.json` says, or None.
        ties: For each tensor that the model shares, the name under which its values are stored.
        device: Where blocks are computed.
        written: Tensors that adapters name and that `merged` has given whole, so none of an earlier, interrupted run.
        unchanged: Those of them that are as they were.
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
        """How training held the base; None: unquantised, or not known."""
        settings = self.provenance.quantization if self.provenance else None
        return None if settings is None else QuantizationConfig(**settings)

    def quantized_base(self) -> QuantizedBase:
        """The base as training held it."""
        assert self.provenance is not None and self.quantization is not None
        return QuantizedBase(self.reader, self.quantization, DTYPES[self.provenance.compute_dtype], self.device)

    def rows(self, name: str) -> Rows:
        """A tensor's rows in `base`; a shared one that is written apart has its twin's."""
        return self.base.open(self.ties.get(name, name))

    def merged(self, plan: TensorPlan) -> Iterator[Tensor]:
        """A planned tensor's blocks, in its dtype, on the CPU.

        Raises:
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
        self.written.append(plan.name)
        if not changed:
            self.unchanged.append(plan.name)


def open_source(llm: str, adapters: Sequence[tuple[Path, float]], device: torch.device, *, force: bool) -> MergeSource:
    """Opens base and adapters; the adapters are added to the published weights until another base is chosen.

    Raises:
        ModelError: the base cannot be read, or is stored quantised.
        CheckpointError: an adapter cannot be read, or is of another base (unless `force`).
    """
    folder = resolve_model(llm)
    _check_plain(folder)
    reader = open_weights(folder)
    digest = fingerprint(reader)
    parts = []
    for path, weight in adapters:
        path = resolve_checkpoint(path)
        provenance = check_adapter(path, None if force else digest)
        check_template(provenance, path)
        parts.append(Weighted(AdapterFile(path, device), weight))
    return MergeSource(reader, PublishedBase(reader), tuple(parts), provenance, shared_tensors(folder), device)


def _check_plain(folder: Path) -> None:
    """Raises ModelError where the weights are stored quantised: an adapter's change has no place among their codes."""
    config = folder / 'config.json'
    settings = read_json(config).get('quantization_config') if config.is_file() else None
    if not settings:
        return
    kind = settings.get('quant_method', 'an unknown form') if isinstance(settings, dict) else 'an unknown form'
    raise ModelError(f'{folder} is stored quantised ({str(kind)[:40]}), and a merge needs plain weights; name the '
                     'unquantised model that it was made from')  # fmt: skip


def plan_tensors(source: MergeSource, dtype: torch.dtype) -> tuple[list[TensorPlan], dict[str, Any]]:
    """What will be written, in the order of the base's files, and which fields of the config change with it.

    Raises:
        CheckpointError: an adapter does not fit the base, or changes nothing.
    """
    names = source.reader.names()
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
            raise CheckpointError(f'{part.adapter.folder} changes {_some(missing)}, which '
                                  f'{source.reader.folder} has not; nothing of an adapter is left out')  # fmt: skip
        part.adapter.check_pairs()
        _check_trained(part.adapter)
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


def _check_trained(adapter: AdapterFile) -> None:
    """Warns of updates that are all zero, such as those of experts that no token reached; raises where all are."""
    zero = adapter.untrained()
    if len(zero) == len(adapter.targets):
        raise CheckpointError(f'{adapter.folder} changes nothing: the update of {_some(zero)} is all zero; it was not '
                              'trained, or not saved whole')  # fmt: skip
    if zero:
        logger.warning('%s changes nothing in %d of %d tensors, whose update is all zero: %s', adapter.folder,
                       len(zero), len(adapter.targets), _some(zero))  # fmt: skip


def check_changed(source: MergeSource, dtype: torch.dtype, num_tensors: int) -> None:
    """Says how many tensors changed, and warns of those that adapters name and that were written as they were.

    Raises:
        CheckpointError: none of them changed.
    """
    same, before = sorted(source.unchanged), len(source.targets) - len(source.written)
    if before:
        logger.warning('an interrupted run wrote %d of the %d tensors that adapters name: whether they changed is not '
                       'known; of the other %d, %d changed', before, len(source.targets), len(source.written),
                       len(source.written) - len(same))  # fmt: skip
        return
    if len(same) == len(source.targets):
        raise CheckpointError(f'in {short(dtype)} no value of {_some(same)} changes, so the result would be the base; '
                              'the adapter was trained too little, or not at all')  # fmt: skip
    if same:
        logger.warning('in %s no value changes in %d of the %d tensors that adapters name: %s', short(dtype), len(same),
                       len(source.targets), _some(same))  # fmt: skip
    logger.info('%d tensors of %d changed', len(source.targets) - len(same), num_tensors)


def short(dtype: torch.dtype) -> str:
    """'float16'."""
    return str(dtype).removeprefix('torch.')


def _some(names: Sequence[str]) -> str:
    """'a', or 'a and 3 more tensors'."""
    return names[0] + (f' and {len(names) - 1} more tensors' if len(names) > 1 else '')
