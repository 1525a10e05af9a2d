"""Classical configs: what each part becomes, what is said of the rest, what is refused; and each runs a step."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from xtuner.cli.main import main
from xtuner.config.load import load_config
from xtuner.errors import ConfigError

pytestmark = pytest.mark.unit

FILES = Path(__file__).parent / 'classical'
NAMES = [
    'xtuner.engine.runner:TrainLoop', 'xtuner.dataset.collate_fns:default_collate_fn', 'xtuner.utils:PROMPT_TEMPLATE',
    'xtuner.utils:SYSTEM_TEMPLATE', 'xtuner.engine.hooks:DatasetInfoHook', 'xtuner.engine.hooks:EvaluateChatHook',
    'xtuner.engine.hooks:VarlenAttnArgsToMessageHubHook', 'xtuner.engine.hooks:ThroughputHook',
    'xtuner.engine.hooks:HFCheckpointHook', 'xtuner.engine:DatasetInfoHook', 'xtuner.engine:EvaluateChatHook',
    'xtuner.model:SupervisedFinetune', 'xtuner.dataset:process_hf_dataset', 'xtuner.dataset:process_ms_dataset',
    'xtuner.dataset:ConcatDataset', 'xtuner.dataset:MOSSSFTDataset',
    'xtuner.dataset.map_fns:template_map_fn_factory', 'xtuner.dataset.map_fns:oasst1_map_fn',
    'xtuner.parallel.sequence:SequenceParallelSampler', 'xtuner.dataset.samplers:LengthGroupedSampler',
    'xtuner.registry:BUILDER', 'xtuner.registry:MAP_FUNC',
]  # fmt: skip


def config_text(name: str) -> str:
    return (FILES / f'{name}.py').read_text(encoding='utf-8')


def written(folder: Path, text: str) -> str:
    path = folder / 'mine.py'
    path.write_text(text, encoding='utf-8')
    return str(path)


@pytest.mark.torch
@pytest.mark.parametrize('name', NAMES)
def test_the_names_of_classical_configs_resolve(name: str) -> None:
    module, _, attribute = name.partition(':')
    assert getattr(importlib.import_module(module), attribute) is not None


def test_qlora(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(str(FILES / 'internlm_qlora_oasst1.py'))
    model, data, schedule = config.model, config.dataset, config.schedule
    assert (model.path, model.template, model.dtype) == ('internlm/internlm-7b', 'internlm_chat', 'fp16')
    assert not model.trust_remote_code
    assert (config.quantization.bits, config.quantization.quant_type, config.quantization.double_quant) == (
        4, 'nf4', True)  # fmt: skip
    assert config.adapter == {'type': 'peft:LoraConfig', 'r': 64, 'lora_alpha': 16, 'lora_dropout': 0.1,
                              'bias': 'none', 'task_type': 'CAUSAL_LM', 'target_modules': 'all-linear'}  # fmt: skip
    assert (data.source, data.map_fn) == ('timdettmers/openassistant-guanaco', 'oasst1')
    assert (data.max_length, data.packing) == (2048, 'best_fit')
    assert (data.on_bad_record, data.unique_id) == ('skip', None)
    assert config.optimizer == {'type': 'torch.optim:AdamW', 'lr': 2e-4, 'betas': (0.9, 0.999), 'weight_decay': 0}
    assert (schedule.max_epochs, schedule.max_steps, schedule.batch_size, schedule.accumulative_counts) == (
        3, None, 1, 16)  # fmt: skip
    assert (schedule.warmup_ratio, schedule.decay, schedule.min_lr_ratio) == (pytest.approx(0.03), 'cosine', 0)
    assert (schedule.max_norm, config.checkpoint.interval, config.checkpoint.max_keep) == (1, 31, 2)
    assert (config.samples.interval, len(config.samples.prompts)) == (31, 2)
    assert config.samples.system.startswith('Read the instruction')
    assert (config.log.trackers, config.hooks, config.runtime.seed) == ([], [], 42)
    said = capsys.readouterr().err
    for word in ('trust_remote_code is ignored', 'do not attend to each other', '500 iterations are 31 steps',
                 'no effect: env_cfg, log_level, log_processor'):  # fmt: skip
        assert said.count(word) >= 1
    assert said.count('trust_remote_code') == 2  # one line, which also names the option


def test_lora_on_two_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(str(FILES / 'internlm_lora_alpaca.py'))
    assert config.quantization is None
    assert config.adapter['target_modules'] == ['q_proj', 'v_proj']
    assert config.dataset.source == [
        {'path': 'tatsu-lab/alpaca', 'map_fn': 'alpaca'},
        {'path': 'silk-road/alpaca-data-gpt4-chinese', 'map_fn': 'alpaca_zh'},
    ]
    assert (config.schedule.min_lr_ratio, config.schedule.max_norm) == (pytest.approx(0.1), 0.5)
    assert config.hooks == [{'type': 'xtuner.engine.hooks:HFCheckpointHook'}]
    assert (config.log.trackers, config.runtime.seed, config.model.dtype) == (['tensorboard'], 7, 'bf16')
    assert (config.checkpoint.max_keep, config.samples.max_new_tokens) == (-1, 4)
    assert config.checkpoint.interval >= 10**6  # only at the end
    assert 'do not attend to each other' not in capsys.readouterr().err  # as the file has it


def test_all_weights() -> None:
    config = load_config(str(FILES / 'internlm_full_custom.py'))
    assert (config.quantization, config.adapter, config.model.dtype) == (None, None, 'fp32')
    assert (config.dataset.source, config.dataset.map_fn) == ('conversations.json', None)
    assert (config.dataset.packing, config.dataset.group_by_length) == ('none', True)
    assert (config.schedule.max_steps, config.schedule.decay, config.schedule.warmup_ratio) == (300, 'cosine', 0)
    assert (config.schedule.max_norm, config.checkpoint.interval) == (None, 100)


FAULTS = [
    ('max_norm=max_norm, error', 'max_norm=max_norm, norm_type=1, error', r'clip_grad\.norm_type'),
    ("load_from = None", "load_from = 'a.pth'", r'load_from.*--resume'),
    ('sequence_parallel_size = 1', 'sequence_parallel_size = 2', 'set `parallel.sequence_parallel_size`'),
    ('eta_min=0.0', 'gamma=0.5', r'param_scheduler\[1\]\.gamma.*not supported'),
    ('        end=max_epochs', '        end=2', r'goes from 0\.09 to 2'),
    ('start_factor=1e-5', 'start_factor=0.5', 'start_factor'),
    ('max_length=max_length', 'max_dataset_length=10', r'max_dataset_length.*max_length` is missing'),
    ("loss_scale='dynamic'", "loss_scale='dynamic', paramwise_cfg=dict(a=1)", 'the same learning rate'),
    ('type=process_hf_dataset', 'type=load_dataset', r'dataset\.type` is load_dataset; supported: process_hf_dataset'),
    ('shuffle=True)', 'shuffle=False)', 'always shuffled'),
    ("r=64", "r=64), max_position_embeddings=dict(a=4", 'max_position_embeddings'),
    ('torch_dtype=torch.float16', 'torch_dtype=torch.float16, rope_scaling=dict(factor=2)', r'llm\.rope_scaling'),
    ('resume = False', "resume = False\nval_dataloader = dict(batch_size=1)", r'val_dataloader.*dataset\.val_file'),
    ('template=prompt_template)', "template=dict(SYSTEM='a'))", r'template_map_fn\.template'),
    ('path=data_path', "path='json', data_files='a.json', split='train[:9]'", 'all records of a file are read'),
    ("dtype='float16'", "dtype='int8'", r"optim_wrapper\.dtype` is 'int8'"),
]  # fmt: skip


@pytest.mark.parametrize(('old', 'new', 'message'), FAULTS)
def test_what_would_change_the_result_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = config_text('internlm_qlora_oasst1')
    assert old in text
    file = written(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert str(caught.value).startswith(f'{file}: unsupported in a classical config: ')


VARIANTS = [
    ('start_factor=1e-5', 'start_factor=1 / 40', 'a warm-up starts at 0 now', 'schedule.decay', 'cosine'),
    ('        end=max_epochs', '        T_max=max_epochs', 'ends at 3.09, the run at 3; now both end',
     'schedule.decay', 'cosine'),
    ('collate_fn=dict', "batch_sampler=dict(type='BatchSampler', drop_last=True, batch_size=1), collate_fn=dict",
     'batch_sampler.drop_last (the last batch is always filled up)', 'schedule.batch_size', 1),
    ('dataset_map_fn=oasst1_map_fn', 'dataset_map_fn=None', '', 'dataset.map_fn', None),
    ('dataset=train_dataset', 'dataset=dict(type="ConcatDataset", datasets_cfg=dict(a=train_dataset))', '',
     'dataset.map_fn', 'oasst1'),
    ('num_workers=dataloader_num_workers', 'num_workers=2, persistent_workers=True', 'persistent_workers (set',
     'runtime.num_workers', 2),
    ("dtype='float16'", 'dtype=torch.bfloat16', "base is loaded in the compute dtype bf16, not in 'torch:float16'",
     'model.dtype', 'bf16'),
    ("visualizer = None", "visualizer = dict(vis_backends=[dict(type='WandbVisBackend', init_kwargs=dict(a=1))])",
     'vis_backends', 'log.trackers', ['wandb']),
    ('evaluation_inputs=evaluation_inputs', "evaluation_inputs='Hello'", '', 'samples.prompts', ['Hello']),
    ('template_map_fn=dict(type=template_map_fn_factory, template=prompt_template)', 'template_map_fn=None', '',
     'model.template', 'plain'),
    ('max_keep_ckpts=save_total_limit', 'max_keep_ckpts=-1', '', 'checkpoint.max_keep', -1),
    ('max_keep_ckpts=save_total_limit', '', 'max_keep_ckpts` is not set: all', 'checkpoint.max_keep', -1),
    ('type=SupervisedFinetune', "type='xtuner.model.SupervisedFinetune'", '', 'model.path', 'internlm/internlm-7b'),
    ('type=AmpOptimWrapper', "type='mmengine.optim.AmpOptimWrapper'", '', 'model.dtype', 'fp16'),
    ('type=AutoModelForCausalLM.from_pretrained', "type='transformers.AutoModelForCausalLM.from_pretrained'", '',
     'model.path', 'internlm/internlm-7b'),
    ('dataset_map_fn=oasst1_map_fn', "dataset_map_fn='xtuner.dataset.map_fns.oasst1_map_fn'", '', 'dataset.map_fn',
     'oasst1'),
    ('dataset_map_fn=oasst1_map_fn', "dataset_map_fn='my.mapping.mine'", '', 'dataset.map_fn', 'my.mapping:mine'),
    ("loss_scale='dynamic'", 'loss_scale=512.0', 'the loss scale is always dynamic', 'schedule.max_norm', 1),
]  # fmt: skip


@pytest.mark.parametrize(('old', 'new', 'said', 'key', 'value'), VARIANTS)
def test_variants_run_with_a_word(
    old: str, new: str, said: str, key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_text('internlm_qlora_oasst1')
    assert old in text
    config = load_config(written(tmp_path, text.replace(old, new, 1)))
    section, _, name = key.partition('.')
    assert getattr(getattr(config, section), name) == value
    assert said in capsys.readouterr().err


def test_eight_bits_beside_the_path(tmp_path: Path) -> None:
    text = config_text('internlm_lora_alpaca').replace('torch_dtype=torch.bfloat16', 'load_in_8bit=True')
    assert load_config(written(tmp_path, text)).quantization.bits == 8


def test_every_fault_is_in_one_message(tmp_path: Path) -> None:
    text = config_text('internlm_qlora_oasst1').replace('load_from = None', "load_from = 'a.pth'")
    with pytest.raises(ConfigError, match=r'load_from.*;.*sequence_parallel_size|sequence_parallel_size.*;.*load_from'):
        load_config(written(tmp_path, text.replace('sequence_parallel_size = 1', 'sequence_parallel_size = 2')))


def test_what_nothing_uses_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config_text('internlm_qlora_oasst1') + '\ndefault_hook = dict(type=LoggerHook, interval=3)\n'
    load_config(written(tmp_path, text))
    assert '`default_hook` is used by no section' in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    text = config_text('internlm_qlora_oasst1').replace(
        '    pretrained_model_name_or_path=pretrained_model_name_or_path,\n    trust',
        "    pretrained_model_name_or_path='another/model',\n    trust",
    )
    with pytest.raises(ConfigError, match="'another/model' and the model is 'internlm/internlm-7b'"):
        load_config(written(tmp_path, text))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Ten short records in each of the formats that the three files read."""
    records = {
        'oasst1': [{'text': f'### Human: Say {i}.### Assistant: {i}.'} for i in range(10)],
        'alpaca': [{'instruction': f'Say {i}.', 'input': '', 'output': f'{i}.'} for i in range(9)]
        + [{'instruction': 'Say nothing.', 'input': '', 'output': ''}],
        'alpaca_zh': [{'instruction_zh': f'说{i}。', 'input_zh': '', 'output_zh': f'{i}。'} for i in range(10)],
        'conversation': [{'conversation': [{'system': 'Short.', 'input': f'Say {i}.', 'output': f'{i}.'}]}
                         for i in range(10)],
    }  # fmt: skip
    files = {}
    for name, rows in records.items():
        files[name] = tmp_path / f'{name}.jsonl'
        files[name].write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return files


def run(folder: Path, text: str, model: Path, *options: str) -> Path:
    """Trains one step of a classical config whose base is a small model; returns the checkpoint."""
    file = written(folder, text.replace('internlm/internlm-7b', str(model)))
    words = ['train', file, '--work-dir', str(folder / 'run'), '--max-steps', '1']
    assert main([*words, *(('--cfg-options', *options) if options else ())]) == 0
    return folder / 'run' / 'checkpoint-00000001'


@pytest.mark.torch
def test_qlora_runs(tiny_internlm: Path, data: dict[str, Path], tmp_path: Path) -> None:
    text = config_text('internlm_qlora_oasst1').replace('timdettmers/openassistant-guanaco', str(data['oasst1']))
    text = text.replace('max_length = 2048', 'max_length = 64')
    folder = run(tmp_path, text, tiny_internlm, 'model.dtype=fp32', 'samples.max_new_tokens=2')
    settings = json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8'))
    assert settings['r'] == 64
    assert {name.rpartition('.')[2] for name in settings['target_modules']} == {
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}  # fmt: skip


@pytest.mark.torch
def test_lora_runs_and_leaves_what_its_hook_was_to_write(
    tiny_internlm: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_text('internlm_lora_alpaca').replace('tatsu-lab/alpaca', str(data['alpaca']))
    text = text.replace('silk-road/alpaca-data-gpt4-chinese', str(data['alpaca_zh']))
    folder = run(tmp_path, text.replace('max_length = 2048', 'max_length = 64'), tiny_internlm)
    assert (folder.parent / 'hf_model' / 'adapter_model.safetensors').is_file()
    said = capsys.readouterr().err
    assert '20 records' in said
    assert '1 could not be used' in said  # the one without an answer


@pytest.mark.torch
def test_all_weights_run(tiny_internlm: Path, data: dict[str, Path], tmp_path: Path) -> None:
    text = config_text('internlm_full_custom').replace('conversations.json', str(data['conversation']))
    folder = run(tmp_path, text, tiny_internlm)
    with safe_open(folder / 'model.safetensors', 'pt') as tensors:
        assert 'lm_head.weight' in tensors.keys()  # noqa: SIM118
    flat = (folder.parent / 'config.py').read_text(encoding='utf-8')
    assert re.search(r"packing='none'", flat)
    assert main(['print-config', str(folder.parent / 'config.py')]) == 0
