"""A classical config's sections -> the values of `TrainConfig`."""

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
# Hooks whose work is always done here: shown data, rates of tokens, samples of a pack apart.
_ALWAYS = ('DatasetInfoHook', 'ThroughputHook', 'VarlenAttnArgsToMessageHubHook')


def is_classical(values: Mapping[str, Any]) -> bool:
    """Whether a config file's names are those of the classical form."""
    return 'train_dataloader' in values and 'optim_wrapper' in values


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the sections of a `TrainConfig`, and a line for each thing that is different or has no effect here.

    Args:
        values: The names of a classical config file, as `load.read_file` returns them.

    Raises:
        ConfigError: For what is not understood and could change the result; all faults in one message.
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
    loader.pass_over('read as the data needs it', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'drop_last')
    loader.close()
    sections |= _reports(top, path, to_steps)
    _rest(top, path)
    if findings.faults:
        raise ConfigError('read as a classical config: ' + '; '.join(findings.faults))
    return {**sections, 'optimizer': dict(optimizer), 'schedule': schedule}, findings.notes


def _compute_dtype(wrapper: Section, top: Section) -> str:
    kind = wrapper.type('AmpOptimWrapper', 'OptimWrapper')
    scale = wrapper.take('loss_scale', 'dynamic')
    if kind == 'AmpOptimWrapper':
        if scale != 'dynamic':
            wrapper.findings.note(f'`optim_wrapper.loss_scale` = {scale!r}: the scale is always found while training')
        return _dtype(wrapper.take('dtype') or 'float16', wrapper, 'dtype')
    llm: Any = (top.take('model') or {}).get('llm') or {}
    return _dtype(llm.get('torch_dtype') or llm.get('dtype') or 'float32', wrapper, 'dtype')


def _dtype(value: Any, section: Section, key: str) -> str:
    name = str(value).rpartition(':')[2].rpartition('.')[2]
    if name not in _DTYPES:
        section.fault(f'`{section.path(key)}` is {value!r}; understood: {", ".join(_DTYPES)}')
    return _DTYPES.get(name, 'auto')


def _model(top: Section, dtype: str) -> dict[str, Any]:
    section = top.section('model')
    section.type('SupervisedFinetune')
    llm = section.section('llm')
    llm.type('AutoModelForCausalLM.from_pretrained')
    model = {'path': llm.need('pretrained_model_name_or_path') or '', 'dtype': dtype}
    model |= {'revision': llm.take('revision'), 'attention': _attention(llm)}
    if llm.take('trust_remote_code'):
        llm.findings.note('trust_remote_code is not taken over: InternLM needs none; for another model that does, '
                          '--cfg-options model.trust_remote_code=True allows it')  # fmt: skip
    given = llm.take('torch_dtype') or llm.take('dtype')
    if given not in (None, 'auto') and _dtype(given, llm, 'torch_dtype') != dtype:
        llm.findings.note(f'the base is held in the compute dtype {dtype}, not in {given!r}')
    llm.pass_over('the launcher gives each process its device', 'device_map', 'low_cpu_mem_usage', 'use_cache')
    quantization = _quantization(llm, dtype)
    llm.close()
    adapter = section.take('lora')
    if adapter is not None:
        adapter = {**adapter, 'target_modules': adapter.get('target_modules') or 'all-linear'}
    checkpointing = section.take('use_activation_checkpointing', True)
    section.refuse('--resume goes on with a run; `xtuner convert merge` joins an adapter with its base', 'peft_model')
    section.refuse("it would change the positions; set it in the model's own config.json", 'max_position_embeddings')
    section.take('use_varlen_attn')
    section.take('tokenizer')  # the model's own, which is checked where it is used
    section.close()
    return {'model': model, 'quantization': quantization, 'adapter': adapter,
            'runtime': {'activation_checkpointing': checkpointing}}  # fmt: skip


def _attention(llm: Section) -> str:
    if llm.take('use_flash_attention_2'):
        return 'flash_attention_2'
    return llm.take('attn_implementation') or 'auto'


def _quantization(llm: Section, dtype: str) -> dict[str, Any] | None:
    """From `quantization_config`, or from `load_in_4bit` and `load_in_8bit` beside the path."""
    beside = {key: True for key in ('load_in_4bit', 'load_in_8bit') if llm.take(key)}
    given = llm.take('quantization_config')
    if given is None and not beside:
        return None
    section = Section(given or beside | {'type': 'BitsAndBytesConfig'}, llm.path('quantization_config'), llm.findings)
    section.type('BitsAndBytesConfig')
    four, eight = section.take('load_in_4bit', False), section.take('load_in_8bit', False)
    computed = section.take('bnb_4bit_compute_dtype')
    if four and computed is not None and _dtype(computed, section, 'bnb_4bit_compute_dtype') != dtype:
        section.findings.note(f'4-bit products are computed in {dtype}, not in {computed!r}')
    kind, double = section.take('bnb_4bit_quant_type', 'fp4'), section.take('bnb_4bit_use_double_quant', False)
    if section.take('llm_int8_threshold', 6.0) != 6.0:
        section.fault(f'`{section.path("llm_int8_threshold")}` must be 6.0, which is what 8 bit uses here')
    section.refuse('frozen weights are kept in 8 bit', 'llm_int8_has_fp16_weight')
    section.close()
    if not (four or eight):
        return None
    return {'bits': 4, 'quant_type': kind, 'double_quant': double} if four else {'bits': 8}


def _order(loader: Section, dataset: dict[str, Any]) -> None:
    """The sampler: shuffled always; by length where it was."""
    sampler = loader.section('sampler')
    kind = sampler.type(*_SAMPLERS, default='DefaultSampler')  # fmt: skip
    if sampler.take('shuffle', True) is False:
        sampler.fault(f'`{sampler.path("shuffle")}` is False: the order is always shuffled here, by the seed; '
                      '`dataset.streaming` keeps it')  # fmt: skip
    sampler.take('per_device_batch_size')
    sampler.take('seed')
    if kind == 'LengthGroupedSampler':
        sampler.pass_over('fifty batches are sorted together', 'mega_batch_mult')
        sampler.take('length_property')
        if dataset['packing'] == 'none':
            dataset['group_by_length'] = True
        else:
            sampler.findings.note('packs are of one length already: LengthGroupedSampler has no effect')
    sampler.pass_over('the last batch is filled up', 'round_up')
    sampler.close()
    batches = loader.section('batch_sampler')
    batches.type('BatchSampler', default='BatchSampler')
    batches.take('batch_size')
    batches.pass_over('the last batch is filled up', 'drop_last')
    batches.close()
    loader.section('collate_fn').type('default_collate_fn', default='default_collate_fn')


def _seed(top: Section) -> dict[str, Any]:
    section = top.section('randomness')
    seed = section.take('seed')
    section.pass_over('ranks draw apart; for the rest see docs/design.md', 'deterministic', 'diff_rank_seed')
    section.close()
    return {} if seed is None else {'seed': seed}


def _reports(top: Section, path: str, to_steps: ToSteps) -> dict[str, Any]:
    """Checkpoints, logs, samples and further hooks."""
    hooks = top.section('default_hooks')
    sections: dict[str, Any] = {
        'log': {'trackers': _trackers(top), **_log(hooks.section('logger'), to_steps)},
        'checkpoint': _checkpoint(hooks.section('checkpoint'), to_steps), 'samples': {'prompts': []}, 'hooks': [],
    }  # fmt: skip
    for name in ('timer', 'param_scheduler', 'sampler_seed', 'runtime_info'):  # always done here
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
    section.pass_over('every step stands in metrics.jsonl', 'log_metric_by_epoch', 'ignore_last')
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
    section.pass_over('a checkpoint is what a run can go on from', 'save_optimizer', 'save_param_scheduler')
    section.close()
    values = {'max_keep': -1 if keep is None else keep}
    if keep is None:
        section.findings.note(f'`{section.path("max_keep_ckpts")}` is not set: all checkpoints are kept')
    if by_epoch:
        section.findings.note('`default_hooks.checkpoint` counts epochs; here a checkpoint is written each 100 steps '
                              '(`checkpoint.interval`) and at the end')  # fmt: skip
        return values
    if interval < 1:  # never, but for the end
        return values | {'interval': 10**9}
    return values | {'interval': to_steps(interval, section.path('interval'))}


def _samples(section: Section, path: str, to_steps: ToSteps) -> dict[str, Any]:
    if 'tokenizer' in section:
        check_tokenizer(section.take('tokenizer'), section.path('tokenizer'), path, section.findings)
    section.take('prompt_template')  # that of the data
    section.refuse('images are not answered here', 'evaluation_images', 'image_processor')
    section.pass_over('samples are the likeliest answers and end where the template ends', 'generation_kwargs',
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
        section.pass_over('trackers have their own environment variables', 'init_kwargs', 'save_dir')
        section.close()
    visualizer.close()
    return [tracker for name in names if (tracker := _TRACKERS.get(name))]


def _rest(top: Section, path: str) -> None:
    """What stands beside: refused where it would change the run, passed over where it cannot, helpers left alone."""
    top.refuse('validate with --cfg-options dataset.val_file=FILE', 'val_dataloader', 'val_cfg', 'val_evaluator',
               'test_dataloader', 'test_cfg', 'test_evaluator')  # fmt: skip
    top.refuse('use --resume, which takes a checkpoint', 'load_from', 'resume', 'resume_from')
    top.refuse('not a setting of the file here; see `xtuner train --help`', 'strategy', 'runner_type')
    top.pass_over('logs and processes are set up by the command', 'env_cfg', 'log_level', 'log_processor',
                  'default_scope', 'launcher')  # fmt: skip
    if 'tokenizer' in top:
        check_tokenizer(top.take('tokenizer'), 'tokenizer', path, top.findings)
    if (size := top.take('sequence_parallel_size') or 1) != 1:
        top.fault(f'`sequence_parallel_size` is {size}: a sequence is not spread over devices here')
    for name, value in top.leftovers().items():
        if isinstance(value, Mapping) and 'type' in value and not _occurs(value, top.values):
            top.findings.note(f'`{name}` is used by no section')


def _occurs(wanted: Mapping[str, Any], values: Any, depth: int = 0) -> bool:
    """Whether a dict stands anywhere below the sections (not among the file's own names)."""
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return any((depth and item == wanted) or _occurs(wanted, item, depth + 1) for item in items)
