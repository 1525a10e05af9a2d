"""Translates the sections of a classical config to values of `TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xtuner.config.classical.data import check_tokenizer, translate_data
from xtuner.config.classical.schedule import translate_schedule
from xtuner.config.classical.section import Findings, Section, imported, type_name
from xtuner.errors import ConfigError

ToSteps = Callable[[int, str], int]

_TRACKERS = {'TensorboardVisBackend': 'tensorboard', 'WandbVisBackend': 'wandb', 'LocalVisBackend': None}
_SAMPLERS = (
    'DefaultSampler',
    'LengthGroupedSampler',
    'SequenceParallelSampler',
    'InfiniteSampler',
    'InternRepoSampler',
)
_DTYPES = {'float16': 'fp16', 'bfloat16': 'bf16', 'float32': 'fp32'}
# Hooks whose function is always on: data preview, throughput, isolation of samples in packs.
_ALWAYS = ('DatasetInfoHook', 'ThroughputHook', 'VarlenAttnArgsToMessageHubHook')


def is_classical(values: Mapping[str, Any]) -> bool:
    """Whether the names of a config file are those of the classical format."""
    return 'train_dataloader' in values and 'optim_wrapper' in values


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the sections of a `TrainConfig`, and a note for each difference or setting without effect.

    Args:
        values: The names of a classical config file, as `load.read_file` returns them.

    Raises:
        ConfigError: a setting is not supported and could change the result; one message lists all.
    """
    findings = Findings()
    top = Section(values, '', findings)
    wrapper, loader = top.section('optim_wrapper'), top.section('train_dataloader')
    dtype = _compute_dtype(wrapper, top)
    sections = _model(top, dtype)
    path = sections['model']['path']
    schedule, to_steps = translate_schedule(top, wrapper, loader)
    optimizer = wrapper.take('optimizer') or {}
    wrapper.close()
    sections['dataset'], sections['model']['template'] = translate_data(loader.section('dataset'), path)
    _order(loader, sections['dataset'])
    sections['runtime'] |= {'num_workers': loader.take('num_workers', 0), **_seed(top)}
    loader.ignore('set automatically', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'drop_last')
    loader.close()
    sections |= _reports(top, path, to_steps)
    _rest(top, path)
    if findings.faults:
        raise ConfigError('unsupported in a classical config: ' + '; '.join(findings.faults))
    return {**sections, 'optimizer': dict(optimizer), 'schedule': schedule}, findings.notes


def _compute_dtype(wrapper: Section, top: Section) -> str:
    kind = wrapper.type('AmpOptimWrapper', 'OptimWrapper')
    scale = wrapper.take('loss_scale', 'dynamic')
    if kind == 'AmpOptimWrapper':
        if scale != 'dynamic':
            wrapper.findings.note(f'`optim_wrapper.loss_scale` = {scale!r}: the loss scale is always dynamic')
        return _dtype(wrapper.take('dtype') or 'float16', wrapper, 'dtype')
    llm: Any = (top.take('model') or {}).get('llm') or {}
    return _dtype(llm.get('torch_dtype') or llm.get('dtype') or 'float32', wrapper, 'dtype')


def _dtype(value: Any, section: Section, key: str) -> str:
    name = str(value).rpartition(':')[2].rpartition('.')[2]
    if name not in _DTYPES:
        section.fault(f'`{section.path(key)}` is {value!r}; supported: {", ".join(_DTYPES)}')
    return _DTYPES.get(name, 'auto')


def _model(top: Section, dtype: str) -> dict[str, Any]:
    section = top.section('model')
    section.type('SupervisedFinetune')
    llm = section.section('llm')
    llm.type('AutoModelForCausalLM.from_pretrained')
    model = {'path': llm.need('pretrained_model_name_or_path') or '', 'dtype': dtype}
    model |= {'revision': llm.take('revision'), 'attention': _attention(llm)}
    if llm.take('trust_remote_code'):
        llm.findings.note('trust_remote_code is ignored: InternLM does not need it; for another model that does, set '
                          '--cfg-options model.trust_remote_code=True')  # fmt: skip
    load_dtype = llm.take('torch_dtype') or llm.take('dtype')
    if load_dtype not in (None, 'auto') and _dtype(load_dtype, llm, 'torch_dtype') != dtype:
        llm.findings.note(f'the base is loaded in the compute dtype {dtype}, not in {load_dtype!r}')
    llm.ignore('the launcher assigns a device to each process', 'device_map', 'low_cpu_mem_usage', 'use_cache')
    quantization = _quantization(llm, dtype)
    llm.close()
    adapter = section.take('lora')
    if adapter is not None:
        adapter = {**adapter, 'target_modules': adapter.get('target_modules') or 'all-linear'}
    checkpointing = section.take('use_activation_checkpointing', True)
    section.refuse('use --resume to resume a run, or `xtuner convert merge` to merge an adapter', 'peft_model')
    section.refuse("it would change the positions; set it in the model's config.json", 'max_position_embeddings')
    section.take('use_varlen_attn')
    section.take('tokenizer')  # the model's own; checked where it is used
    section.close()
    return {'model': model, 'quantization': quantization, 'adapter': adapter,
            'runtime': {'activation_checkpointing': checkpointing}}  # fmt: skip


def _attention(llm: Section) -> str:
    if llm.take('use_flash_attention_2'):
        return 'flash_attention_2'
    return llm.take('attn_implementation') or 'auto'


def _quantization(llm: Section, dtype: str) -> dict[str, Any] | None:
    """Translates `quantization_config`, or `load_in_4bit` and `load_in_8bit` next to the path."""
    flags = {key: True for key in ('load_in_4bit', 'load_in_8bit') if llm.take(key)}
    quantization_config = llm.take('quantization_config')
    if quantization_config is None and not flags:
        return None
    section = Section(
        quantization_config or flags | {'type': 'BitsAndBytesConfig'}, llm.path('quantization_config'), llm.findings
    )
    section.type('BitsAndBytesConfig')
    four, eight = section.take('load_in_4bit', False), section.take('load_in_8bit', False)
    compute_dtype = section.take('bnb_4bit_compute_dtype')
    if four and compute_dtype is not None and _dtype(compute_dtype, section, 'bnb_4bit_compute_dtype') != dtype:
        section.findings.note(f'4-bit products are computed in {dtype}, not in {compute_dtype!r}')
    kind, double = section.take('bnb_4bit_quant_type', 'fp4'), section.take('bnb_4bit_use_double_quant', False)
    if section.take('llm_int8_threshold', 6.0) != 6.0:
        section.fault(f'`{section.path("llm_int8_threshold")}` must be 6.0, the value used for 8 bits')
    section.refuse('frozen weights are stored in 8 bits', 'llm_int8_has_fp16_weight')
    section.close()
    if not (four or eight):
        return None
    return {'bits': 4, 'quant_type': kind, 'double_quant': double} if four else {'bits': 8}


def _order(loader: Section, dataset: dict[str, Any]) -> None:
    """Translates the sampler: always shuffled, by length if it was."""
    sampler = loader.section('sampler')
    kind = sampler.type(*_SAMPLERS, default='DefaultSampler')  # fmt: skip
    if sampler.take('shuffle', True) is False:
        sampler.fault(f'`{sampler.path("shuffle")}` is False: the order is always shuffled with the seed; use '
                      '`dataset.streaming` to keep it')  # fmt: skip
    sampler.take('per_device_batch_size')
    sampler.take('seed')
    if kind == 'LengthGroupedSampler':
        sampler.ignore('fifty batches are always sorted together', 'mega_batch_mult')
        sampler.take('length_property')
        if dataset['packing'] == 'none':
            dataset['group_by_length'] = True
        else:
            sampler.findings.note('LengthGroupedSampler has no effect, because packs have equal lengths')
    sampler.ignore('the last batch is always filled up', 'round_up')
    sampler.close()
    batches = loader.section('batch_sampler')
    batches.type('BatchSampler', default='BatchSampler')
    batches.take('batch_size')
    batches.ignore('the last batch is always filled up', 'drop_last')
    batches.close()
    loader.section('collate_fn').type('default_collate_fn', default='default_collate_fn')


def _seed(top: Section) -> dict[str, Any]:
    section = top.section('randomness')
    seed = section.take('seed')
    section.ignore('ranks have different seeds; see Determinism in docs/design.md', 'deterministic', 'diff_rank_seed')
    section.close()
    return {} if seed is None else {'seed': seed}


def _reports(top: Section, path: str, to_steps: ToSteps) -> dict[str, Any]:
    """Translates checkpoints, logs, samples and other hooks."""
    hooks = top.section('default_hooks')
    sections: dict[str, Any] = {
        'log': {'trackers': _trackers(top), **_log(hooks.section('logger'), to_steps)},
        'checkpoint': _checkpoint(hooks.section('checkpoint'), to_steps), 'samples': {'prompts': []}, 'hooks': [],
    }  # fmt: skip
    for name in ('timer', 'param_scheduler', 'sampler_seed', 'runtime_info'):  # always on
        hooks.take(name)
    hooks.close()
    for number, hook in enumerate(top.take('custom_hooks') or []):
        section = Section(hook, f'custom_hooks[{number}]', top.findings)
        name = type_name(section.take('type'))
        if name == 'EvaluateChatHook':
            sections['samples'] = _samples(section, path, to_steps)
        elif name not in _ALWAYS:
            sections['hooks'].append(section.values)
    return sections


def _log(section: Section, to_steps: ToSteps) -> dict[str, Any]:
    section.take('type')
    interval = section.take('interval', 10)
    section.ignore('metrics.jsonl contains every step', 'log_metric_by_epoch', 'ignore_last')
    section.close()
    return {'interval': to_steps(interval, section.path('interval'))}


def _checkpoint(section: Section, to_steps: ToSteps) -> dict[str, Any]:
    section.take('type')
    interval, keep, by_epoch = (
        section.take('interval', -1),
        section.take('max_keep_ckpts'),
        section.take('by_epoch', True),
    )
    section.take('save_last')  # always
    section.ignore('checkpoints always contain the state to resume from', 'save_optimizer', 'save_param_scheduler')
    section.close()
    values = {'max_keep': -1 if keep is None else keep}
    if keep is None:
        section.findings.note(f'`{section.path("max_keep_ckpts")}` is not set: all checkpoints are kept')
    if by_epoch:
        section.findings.note('`default_hooks.checkpoint` counts epochs; now a checkpoint is written every 100 steps '
                              '(`checkpoint.interval`) and at the end')  # fmt: skip
        return values
    if interval < 1:  # only at the end
        return values | {'interval': 10**9}
    return values | {'interval': to_steps(interval, section.path('interval'))}


def _samples(section: Section, path: str, to_steps: ToSteps) -> dict[str, Any]:
    if 'tokenizer' in section:
        check_tokenizer(section.take('tokenizer'), section.path('tokenizer'), path, section.findings)
    section.take('prompt_template')  # the template of the model is used
    section.refuse('images are not supported', 'evaluation_images', 'image_processor')
    section.ignore('samples use greedy decoding and the stop tokens of the template', 'generation_kwargs',
                   'stop_word', 'stop_words')  # fmt: skip
    prompts = section.take('evaluation_inputs') or []
    values = {
        'prompts': [prompts] if isinstance(prompts, str) else list(prompts),
        'system': imported(section.take('system')) or '',
    }
    if 'max_new_tokens' in section:
        values['max_new_tokens'] = section.take('max_new_tokens')
    if 'every_n_iters' in section:
        values['interval'] = to_steps(section.take('every_n_iters'), section.path('every_n_iters'))
    section.close()
    return values


def _trackers(top: Section) -> list[str]:
    visualizer = top.section('visualizer')
    visualizer.take('type')
    visualizer.take('name')
    names = []
    for number, backend in enumerate(visualizer.take('vis_backends') or []):
        section = Section(backend, f'visualizer.vis_backends[{number}]', top.findings)
        names.append(section.type(*_TRACKERS))
        section.ignore('use the environment variables of the tracker', 'init_kwargs', 'save_dir')
        section.close()
    visualizer.close()
    return [tracker for name in names if (tracker := _TRACKERS.get(name))]


def _rest(top: Section, path: str) -> None:
    """Handles the other names of the file: rejects, ignores, or leaves them alone as helper variables."""
    top.refuse('validate with --cfg-options dataset.val_file=FILE', 'val_dataloader', 'val_cfg', 'val_evaluator',
               'test_dataloader', 'test_cfg', 'test_evaluator')  # fmt: skip
    top.refuse('use --resume, which takes a checkpoint', 'load_from', 'resume', 'resume_from')
    top.refuse('set on the command line; see `xtuner train --help`', 'strategy', 'runner_type')
    top.ignore('logs and processes are set up by the command', 'env_cfg', 'log_level', 'log_processor',
               'default_scope', 'launcher')  # fmt: skip
    if 'tokenizer' in top:
        check_tokenizer(top.take('tokenizer'), 'tokenizer', path, top.findings)
    if (size := top.take('sequence_parallel_size') or 1) != 1:
        top.fault(
            f'`sequence_parallel_size` is {size}; set `parallel.sequence_parallel_size` in a current config instead'
        )
    for name, value in top.leftovers().items():
        if isinstance(value, Mapping) and 'type' in value and not _occurs(value, top.values):
            top.findings.note(f'`{name}` is used by no section')


def _occurs(wanted: Mapping[str, Any], values: Any, depth: int = 0) -> bool:
    """Whether a dict occurs anywhere within the sections (not only as a top-level name)."""
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return any((depth and item == wanted) or _occurs(wanted, item, depth + 1) for item in items)
