"""Configs: every shipped one loads and is small; every fault is named with its place and its nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.config.find import config_root, find_config, list_configs
from xtuner.config.flatten import flatten
from xtuner.config.load import load_config, parse_options
from xtuner.dataset.map_fns import resolve_map_fn
from xtuner.errors import ConfigError, UsageError
from xtuner.registry import check_arguments

pytestmark = pytest.mark.unit

FLAGSHIP = 'internlm_7b_qlora_oasst1'


def write(folder: Path, text: str, name: str = 'mine.py') -> str:
    path = folder / name
    path.write_text(text, encoding='utf-8')
    return str(path)


@pytest.mark.torch
@pytest.mark.parametrize('name', sorted(list_configs()))
def test_every_shipped_config_loads_and_its_open_sections_fit_what_they_name(name: str) -> None:
    config = load_config(name)
    check_arguments(config.optimizer, 'optimizer', given=('params',))
    if config.adapter is not None:
        check_arguments(config.adapter, 'adapter')


@pytest.mark.parametrize('name', sorted(list_configs()))
def test_every_leaf_is_short_and_says_what_it_is(name: str) -> None:
    lines = list_configs()[name].read_text(encoding='utf-8').splitlines()
    assert lines[0].startswith('# ')
    assert len(lines) <= 25


def test_shipped_names_are_unique() -> None:
    leaves = [f.stem for f in config_root().rglob('*.py') if '_base_' not in f.parts]
    assert sorted(leaves) == sorted(set(leaves))


def test_the_flagship_is_the_recipe_it_claims_to_be() -> None:
    config = load_config(FLAGSHIP)
    assert config.model.path == 'internlm/internlm-7b'
    assert config.model.template == 'internlm_chat'
    assert (config.quantization.bits, config.quantization.quant_type, config.quantization.double_quant) == (
        4,
        'nf4',
        True,
    )
    adapter = {k: config.adapter[k] for k in ('r', 'lora_alpha', 'lora_dropout', 'target_modules')}
    assert adapter == {'r': 64, 'lora_alpha': 16, 'lora_dropout': 0.1, 'target_modules': 'all-linear'}
    assert config.dataset.max_length == 2048
    assert config.optimizer['type'] == 'bitsandbytes.optim:PagedAdamW32bit'
    assert config.optimizer['lr'] == 2e-4
    schedule = config.schedule
    assert (schedule.batch_size, schedule.accumulative_counts, schedule.max_epochs) == (1, 16, 3)
    assert (schedule.warmup_ratio, schedule.decay, schedule.max_norm) == (0.03, 'cosine', 1.0)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(FLAGSHIP, {'dataset.max_lenght': 1, 'schedule.batch_size': 0, 'quantization.bits': 3})
    assert str(caught.value).count(';') >= 2
    for part in ('max_lenght', 'batch_size', 'quantization.bits'):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = dict(path="x"', ':1: '),
        ('model = dict(path=undefined)', "name 'undefined' is not defined"),
        ('from peft import LoraConfig\nmodel = 1 / 0', ':2: '),
        ('lr = 1', 'unknown key `lr`'),
        ('', '`model` is missing: the base model'),
    ],
)
def test_a_broken_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_faults_of_options_are_not_laid_on_the_file(tmp_path: Path) -> None:
    """Nor the other way round; a value that an option replaces is no fault any more."""
    path = tmp_path / 'own.py'
    path.write_text("model = {'path': 7}\ndataset = {'source': 'a.jsonl', 'max_lenght': 9}\n", encoding='utf-8')
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {'model.path': 'here', 'schedule.max_epochs': 'two'})
    of_file, of_options = str(caught.value).split('; command-line options: ')
    assert of_file.startswith(f'{path}: unknown key `dataset.max_lenght`') and 'model.path' not in of_file
    assert of_options == "`schedule.max_epochs` must be a number, got 'two'"


def test_a_file_may_have_helpers_with_an_underscore(tmp_path: Path) -> None:
    flat = flatten(load_config(FLAGSHIP), title='flat').replace('lr=0.0002', 'lr=_lr')
    path = write(tmp_path, flat.replace('# the base model', '_lr = 3e-4\n', 1))
    assert load_config(path).optimizer['lr'] == 3e-4


def test_an_unknown_name_gets_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=f"no config 'internlm_7b_qlora_oast1'; did you mean '{FLAGSHIP}'"):
        find_config('internlm_7b_qlora_oast1')
    with pytest.raises(ConfigError, match='no config file'):
        find_config('nowhere/mine.py')


def test_options_are_literals_or_text() -> None:
    assert parse_options(['a.b=1', 'c=None', 'd=[1, 2]', 'e=some text', 'f=']) == {
        'a.b': 1,
        'c': None,
        'd': [1, 2],
        'e': 'some text',
        'f': '',
    }
    with pytest.raises(UsageError, match='KEY=VALUE'):
        parse_options(['a.b'])


MINIMAL = """
model = dict(path='/base', template='internlm_chat')
optimizer = dict(type='torch.optim:AdamW', lr=1e-4)
"""
FUNCTION = """
import re

def mine(example):
    return {'conversation': [{'input': re.sub('x', 'y', example['q']), 'output': example['a']}]}
"""


@pytest.mark.parametrize('place', ['in the config', 'next to the config', 'by the name of its file'])
def test_a_map_function_of_ones_own(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works from any folder, and the flat config of the run finds it again."""
    beside = write(tmp_path, FUNCTION, 'functions_beside.py')
    start, value = {
        'in the config': (FUNCTION, 'mine'),
        'next to the config': ('from functions_beside import mine\n', 'mine'),
        'by the name of its file': ('', repr(f'{beside}:mine')),
    }[place]
    file = write(tmp_path, f"{start}{MINIMAL}dataset = dict(source='a.jsonl', map_fn={value})\n", f'{place[:2]}_x.py')
    monkeypatch.chdir('/')
    config = load_config(file)
    flat = write(tmp_path, flatten(config, title='x'), 'flat.py')
    for found in (config, load_config(flat)):
        function = resolve_map_fn(found.dataset.map_fn)
        assert function({'q': 'x?', 'a': 'b'}) == {'conversation': [{'input': 'y?', 'output': 'b'}]}


def test_a_hook_beside_the_config(tmp_path: Path) -> None:
    write(tmp_path, 'class Mine:\n    def __init__(self, a=1): ...\n', 'hooks_beside.py')
    hooks = "from hooks_beside import Mine\nhooks = [dict(type=Mine, a=2)]\ndataset = dict(source='a.jsonl')\n"
    config = load_config(write(tmp_path, hooks + MINIMAL))
    check_arguments(config.hooks[0], 'hooks[0]')
    again = load_config(write(tmp_path, flatten(config, title='x'), 'flat.py'))
    assert again.hooks == config.hooks


@pytest.mark.parametrize(
    ('text', 'message'),
    [('1/0', 'ZeroDivisionError: division by zero'), ('other = 1', "has no 'mine'"), ('mine = 3', 'is a int, which')],
)
def test_a_file_that_names_no_function(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_map_fn(write(tmp_path, text, 'broken_functions.py') + ':mine')
