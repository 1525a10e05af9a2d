"""Earlier names of modules, still understood where users' configs and scripts have them.

A module that moved is found under its earlier name too, and is the same object. Names that classical configs import
from a package are looked up when they are asked for, so that no package imports a later one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = """
convert.adapter_file         adapters.file
convert.combine              adapters.combine
convert.delta                adapters.delta
convert.nf4                  model.weights.nf4
convert.old_checkpoint       convert.legacy_checkpoint
convert.placed_file          convert.direct_io
dataset.collate              dataset.packing.collate
dataset.columns              dataset.mapping.unread_columns
dataset.fields               dataset.mapping.unread_fields
dataset.files                dataset.sources.files
dataset.fingerprint          dataset.cache.fingerprint
dataset.folder               dataset.sources.folder
dataset.function_hash        dataset.cache.function_hash
dataset.hidden_tokens        dataset.templates.hidden_tokens
dataset.internlm_template    dataset.templates.internlm
dataset.jinja_text           dataset.templates.jinja_text
dataset.length               dataset.encode.length
dataset.own_template         dataset.templates.from_tokenizer
dataset.pack                 dataset.packing.pack
dataset.pipeline             dataset.prepare
dataset.prompt               dataset.templates.template
dataset.readers              dataset.sources.readers
dataset.recorded             dataset.mapping.recorded_formats
dataset.rendering            dataset.templates.rendering
dataset.sampler              dataset.packing.sampler
dataset.split                dataset.packing.split
dataset.store                dataset.cache.store
dataset.template             dataset.templates.builtin
dataset.template_probe       dataset.templates.template_probe
dataset.template_worker      dataset.templates.template_worker
dataset.text_encoder         dataset.encode.text_encoder
dataset.tokenize             dataset.encode.conversation_encoder
dataset.worker_pool          dataset.templates.worker_pool
engine.cards                 memory.gpus
engine.checkpoints           engine.checkpoint.store
engine.environment           tracking.environment
engine.facts                 tracking.metadata
engine.launch                engine.distributed.launch
engine.lines                 utils.jsonl
engine.material              engine.build
engine.memory_error          memory.oom
engine.plan                  engine.schedule
engine.report                tracking.report
engine.same_run              engine.checkpoint.run_manifest
engine.space                 engine.checkpoint.disk_space
engine.start                 engine.checkpoint.resume
engine.step_checks           engine.step.checks
engine.step_result           engine.step.result
engine.story                 tracking.sessions
engine.strategies            engine.distributed
engine.train                 engine.run
engine.trainer_state         engine.checkpoint.trainer_state
engine.watch                 engine.distributed.watchdog
engine.work_folder           engine.checkpoint.run_lock
escape                       utils.escape
fields                       utils.fields
files                        utils.files
host_memory                  utils.host_memory
model.adapter                adapters.attach
model.adapter_load           adapters.load
model.adapter_settings       adapters.settings
model.batch_graphs           inference.batch_graphs
model.batching               inference.batching
model.card                   tracking.model_card
model.chat                   model.families.chat_api
model.decode                 inference.decode
model.family_checks          objectives.model_checks
model.fast                   fused.enable
model.generate               inference.generate
model.internlm               model.families.internlm
model.internlm2              model.families.internlm2
model.internlm3              model.families.internlm3
model.kept                   inference.weight_cache
model.kernels                kernels
model.kernels.attention      fused.attention
model.kernels.decoder        fused.decoder
model.kernels.dispatch       kernels.dispatch
model.kernels.fp8            fused.fp8
model.kernels.frozen         fused.frozen
model.kernels.fused_dropout  kernels.triton.dropout
model.kernels.fused_fp8      kernels.triton.fp8
model.kernels.fused_gemv     kernels.triton.gemv
model.kernels.fused_loss     kernels.triton.cross_entropy
model.kernels.fused_nf4      kernels.triton.nf4
model.kernels.fused_prompt   kernels.triton.prefill_attention
model.kernels.fused_rows     kernels.triton.elementwise
model.kernels.fused_step     kernels.triton.decode_attention
model.kernels.fused_words    kernels.triton.nf4_lut
model.kernels.graphs         fused.cuda_graphs
model.kernels.host           fused.offload
model.kernels.last_used      kernels.last_used
model.kernels.layer          fused.layer
model.kernels.linear         fused.linear
model.kernels.loss           fused.loss
model.kernels.onednn         kernels.cpu_gemm
model.kernels.plain          kernels.reference
model.kernels.projections    fused.projections
model.kernels.quantized      kernels.quantized
model.kernels.recompute      fused.recompute
model.kernels.run            fused.context
model.kernels.sequence       fused.ulysses
model.kernels.weights        fused.weights
model.memory                 memory.predict
model.memory_terms           memory.terms
model.out_of_memory          utils.out_of_memory
model.places                 model.weights.offsets
model.progress               utils.progress
model.sft                    objectives.sft
model.shape                  memory.dims
model.shares                 model.sharded_loading
model.sources                model.hub
model.tensor_files           model.weights.files
model.text                   inference.detokenizer
model.trained_base           adapters.trained_base
processes                    utils.processes
serve.answer                 inference.request
serve.batcher                inference.scheduler
serve.decoder                inference.decoder_interface
serve.draw                   inference.sampling
serve.failures               inference.failures
serve.table                  inference.slots
"""
MOVED = {f'xtuner.{old}': f'xtuner.{new}' for old, new in (line.split() for line in _TABLE.split('\n') if line)}
"""Earlier module or package -> today's; what lies in an earlier package is found by the longest entry."""

NAMES = {
    'xtuner.dataset': dict.fromkeys(
        ('ConcatDataset', 'MOSSSFTDataset', 'process_hf_dataset', 'process_ms_dataset'), 'xtuner.dataset.classical'
    ),
    'xtuner.dataset.map_fns': {'template_map_fn_factory': 'xtuner.dataset.classical'},
    'xtuner.engine': dict.fromkeys(
        ('DatasetInfoHook', 'EvaluateChatHook', 'HFCheckpointHook', 'ThroughputHook', 'VarlenAttnArgsToMessageHubHook'),
        'xtuner.engine.hooks',
    ),
    'xtuner.model': {'SupervisedFinetune': 'xtuner.objectives.sft'},
    'xtuner.utils': dict.fromkeys(('PROMPT_TEMPLATE', 'SYSTEM_TEMPLATE'), 'xtuner.dataset.classical_templates'),
}
"""Names that classical configs import from a package -> the module that has them."""

_WERE_MODULES = {
    'xtuner.dataset.cache': 'xtuner.dataset.cache.build_once',
    'xtuner.dataset.mapping': 'xtuner.dataset.mapping.map_records',
    'xtuner.dataset.sources': 'xtuner.dataset.sources.source',
    'xtuner.model.weights': 'xtuner.model.weights.reader',
}
"""Packages that were modules -> where their names are now."""


def former_names(package: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: looks up the names that users import from it and that lie elsewhere."""

    def lookup(name: str) -> Any:
        module = NAMES.get(package, {}).get(name) or _WERE_MODULES.get(package)
        if module is None or name.startswith('__'):
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(importlib.import_module(module), name)

    return lookup


def today(name: str) -> str | None:
    """Today's name of a module; None where it has not moved."""
    parts = name.split('.')
    for length in range(len(parts), 1, -1):
        if (found := MOVED.get('.'.join(parts[:length]))) is not None:
            return '.'.join((found, *parts[length:]))
    return None


class _Finder:
    """Asked first: a submodule of a package that moved would else be loaded a second time, by its path.

    Finder and loader by their methods alone: importing `importlib.abc` would cost each command milliseconds.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader: Any = self
        return ModuleSpec(fullname, loader) if fullname.startswith('xtuner.') and today(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Lets Python make the module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        name = today(module.__name__)
        assert name is not None
        sys.modules[module.__name__] = importlib.import_module(name)


def install() -> None:
    """Makes earlier names importable; importing `xtuner` calls it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
