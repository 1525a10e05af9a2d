"""An objective that a config names: how it can be written, what is refused, and what is kept of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.objectives.toys import Anchored, Preference
from xtuner.cli.main import main
from xtuner.config.flatten import flatten
from xtuner.config.load import load_config
from xtuner.config.short_types import OBJECTIVES
from xtuner.engine.distributed import choose_strategy
from xtuner.errors import ConfigError
from xtuner.objectives.base import FIELDS, Objective
from xtuner.objectives.load import make_objective, objective_code
from xtuner.objectives.sft import Sft
from xtuner.registry import resolve

NAME = 'internlm_7b_qlora_oasst1'
LOSS = """
from xtuner.objectives import Objective


def scaled(rows, factor=1.0):
    return -factor * rows.log_prob.sum()


def with_metrics(rows):
    return -rows.log_prob.sum(), {'targets': rows.count}


class NoObjective:
    pass


class Own(Objective):
    def loss(self, rows, statistics):
        return -rows.log_prob.sum(), {}


class Short(Objective):
    def loss(self, rows):
        return -rows.log_prob.sum(), {}


class Unsummed(Own):
    def statistics(self, rows, more):
        return {}


class Weighed(Own):
    def weight(self):
        return 1


class Joined(Own):
    def collate(self, items):
        return {}


class Lossless(Objective):
    pass


LIST = []
"""
CONFIG = """
from mmengine.config import read_base
with read_base():
    from .base import *
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'losses.py'
    path.write_text(LOSS, encoding='utf-8')
    return path


def loss_of(objective: Objective) -> Any:
    rows: Any = SimpleNamespace(log_prob=torch.tensor([-1.0, -2.0]), count=2)
    return objective.loss(rows, None)


def test_the_default_is_supervised_fine_tuning() -> None:
    config = load_config(NAME)
    assert config.objective == 'sft'
    assert isinstance(make_objective(config.objective), Sft)
    for section in ('sft', {'type': 'sft'}, {'type': Sft}, 'xtuner.objectives.sft:Sft'):
        assert isinstance(make_objective(section), Sft)
    assert load_config(NAME, {'objective': {'type': 'sft'}}).objective == 'sft'  # a run's record does not differ


def test_every_shipped_name_is_an_objective() -> None:
    for target in OBJECTIVES.values():
        assert issubclass(resolve(target), Objective)  # type: ignore[arg-type]


def test_a_function_of_ones_own(file: Path) -> None:
    plain = make_objective(f'{file}:scaled')
    assert (plain.needs, plain.name) == (['log_prob'], 'scaled')
    assert loss_of(plain) == (torch.tensor(3.0), {})
    given = make_objective({'type': f'{file}:scaled', 'factor': 2.0, 'needs': ['log_prob', 'entropy'],
                            'no_grad': ['entropy']})  # fmt: skip
    assert (given.needs, given.no_grad) == (['log_prob', 'entropy'], ['entropy'])
    assert loss_of(given)[0].item() == 6
    assert loss_of(make_objective(f'{file}:with_metrics'))[1] == {'targets': 2}


def test_a_file_next_to_the_config_is_pointed_out(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    file.rename(tmp_path / 'mine' / 'losses.py')
    config = tmp_path / 'mine' / 'own.py'
    text = flatten(load_config(NAME), title='base').replace(
        "objective = 'sft'", "objective = dict(type='losses.py:scaled')"
    )
    config.write_text(text, encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    message = (
        r"`objective`: there is no file 'losses.py' in .*; for the one next to the config write '(mine/.*:scaled)'"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load_config('mine/own.py')
    advice = re.search(message, str(caught.value))
    assert advice is not None
    assert make_objective(load_config('mine/own.py', {'objective.type': advice[1]}).objective).name == 'scaled'
    monkeypatch.chdir(tmp_path / 'mine')
    assert make_objective(load_config('own.py').objective).name == 'scaled'


def test_options_name_it_and_its_arguments(file: Path, tmp_path: Path) -> None:
    overrides = {'objective.type': f'{file}:scaled', 'objective.factor': 2}
    (tmp_path / 'own.py').write_text(flatten(load_config(NAME), title='own'), encoding='utf-8')  # objective = 'sft'
    for name in (NAME, str(tmp_path / 'own.py')):
        assert loss_of(make_objective(load_config(name, overrides).objective))[0].item() == 6
    given = load_config(NAME, {'objective': f'{file}:scaled', 'objective.factor': 3}).objective
    assert loss_of(make_objective(given))[0].item() == 9


@pytest.mark.parametrize('command', [['print-config'], ['estimate', '--no-data']])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['objective=nowhere.py:scaled'], "there is no file 'nowhere.py'"),
        (['objective=FILE:scale'], "has no 'scale'"),
        (['objective.type=FILE:scaled', 'objective.factr=2'], 'unknown key `objective.factr`'),
        (['objective.type=FILE:scaled', "objective.needs=['entrpy']"], "names 'entrpy'"),
        (['objective=FILE:Short'], 'must define `loss(self, rows, statistics)`'),
        (['objective.type=sft', 'objective.factor=2'], 'unknown key `objective.factor`'),
    ],
)
def test_other_commands_check_it_as_training_does(
    command: list[str],
    options: list[str],
    message: str,
    file: Path,
    tiny_internlm: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*command, NAME, '--model', str(tiny_internlm), '--cfg-options']
    assert main([*words, *(option.replace('FILE', str(file)) for option in options)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert message in err.splitlines()[-1]
    assert main([*words, f'objective.type={file}:scaled', 'objective.factor=2']) == 0


def test_a_class_of_ones_own() -> None:
    assert isinstance(make_objective('tests.objectives.toys:Preference'), Preference)
    with pytest.raises(ConfigError, match=r'unknown key `objective\.beta` for'):
        make_objective({'type': Preference, 'beta': 1})


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'type': 'FILE:scaled', 'factr': 2}, "unknown key `objective.factr` for .*; did you mean 'factor'"),
        ({'type': 'FILE:scaled', 'need': ['entropy']}, "unknown key `objective.need`; did you mean 'needs'"),
        ({'type': 'FILE:scaled', 'needs': ['entrpy']}, "`needs` names 'entrpy', .*; did you mean 'entropy'"),
        ({'type': 'FILE:scaled', 'needs': 'entropy'}, "`needs` must be a list of names, got 'entropy'"),
        ({'type': 'FILE:scaled', 'needs': [3]}, '`needs` must be a list of names'),
        (
            {'type': 'FILE:scaled', 'no_grad': ['entropy']},
            "`no_grad` names 'entropy', which does not exist; known: log",
        ),
        ('FILE:scale', "cannot be imported: module '.*' has no 'scale'"),
        ('FILE:LIST', 'is a list, which is not callable'),
        ('FILE:NoObjective', 'NoObjective is a class, but not a subclass of xtuner.objectives.Objective'),
        ('nowhere.py:scaled', "imported: there is no file 'nowhere.py' in /.*, where the command runs"),
        ('/nowhere.py:scaled', "imported: there is no file '/nowhere.py'$"),
        (
            {'type': 'FILE:Own', 'needs': ['entropy']},
            '`objective.needs` is for a function; set `needs` in the class Own',
        ),
        ({'type': 'FILE:Own', 'no_grad': []}, 'set `no_grad` in the class Own'),
        ('FILE:Short', r'the class Short must define `loss\(self, rows, statistics\)`: too many positional'),
        ('FILE:Unsummed', r'Unsummed must define `statistics\(self, rows\)`: missing a required argument'),
        ('FILE:Weighed', r'Weighed must define `weight\(self, batch\)`: too many positional'),
        ('FILE:Joined', r'Joined must define `collate\(self, items, \*, pad_id, multiple_of=1\)`: '),
        ('FILE:Lossless', r'the class Lossless must define `loss\(self, rows, statistics\)`$'),
    ],
)
def test_what_is_wrong_is_named(section: Any, message: str, file: Path) -> None:
    if isinstance(section, dict):
        section = {key: value.replace('FILE', str(file)) if key == 'type' else value for key, value in section.items()}
    else:
        section = section.replace('FILE', str(file))
    with pytest.raises(ConfigError, match=message) as caught:
        make_objective(section)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('sftt', "unknown `objective` 'sftt'; did you mean 'sft'"),
        ('some.module.loss', '; available: sft; write your own function or class as "module:name"'),
        (3, '`objective` must be a dict or text, got 3'),
        (None, '`objective` must be a dict or text, got None'),
        ({'needs': []}, '`objective` needs a `type`'),
        ({'type': 'a:b', 'factor': float('nan')}, '`objective.factor` must be a finite number'),
    ],
)
def test_a_config_is_checked_before_anything_is_imported(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(NAME, {'objective': value})


@pytest.mark.parametrize(
    'text',
    [
        'objective = "{file}:scaled"',
        'from losses import scaled as objective',
        'objective = dict(type="{file}:scaled", factor=2.0, needs=["log_prob"])',
        'from losses import scaled\nobjective = dict(type=scaled)',
        'def objective(rows):\n    return -rows.log_prob.sum()',
    ],
)
def test_a_config_file_may_name_import_or_define_it(text: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / 'own.py'
    base = flatten(load_config(NAME), title='base').replace("objective = 'sft'", '')
    path.write_text(base + '\n' + text.replace('{file}', str(file)) + '\n', encoding='utf-8')
    config = load_config(str(path))
    assert config.objective != 'sft'
    assert loss_of(make_objective(config.objective))[0].item() in (3, 6)
    (tmp_path / 'flat.py').write_text(flatten(config, title='flat'), encoding='utf-8')
    assert load_config(str(tmp_path / 'flat.py')) == config
    code = objective_code(config.objective)
    source = path if 'def objective' in text else file
    source.write_text(source.read_text(encoding='utf-8') + '\n# edited\n', encoding='utf-8')
    assert code and code != objective_code(config.objective)


def test_a_shipped_objective_has_no_code_to_record() -> None:
    assert objective_code('sft') is None
    assert objective_code({'type': 'sft'}) is None


def test_every_field_can_be_needed() -> None:
    assert make_objective({'type': loss_of, 'needs': list(FIELDS)}).needs == list(FIELDS)


@pytest.mark.parametrize(
    ('objective', 'overrides', 'message'),
    [
        (Anchored, {'adapter': None, 'quantization': None}, 'without an adapter there is no base model'),
        (
            Anchored,
            {'parallel.strategy': 'fsdp'},
            'comparison with the base on, strategy `fsdp` cannot be combined',
        ),
        (Anchored, {'parallel.sequence_parallel_size': 2}, 'base model does not support sequence parallelism'),
        (Preference, {'parallel.strategy': 'fsdp'}, 'comparison with the base'),
    ],
)
def test_what_does_not_go_together_is_refused(
    objective: type[Objective], overrides: dict[str, Any], message: str
) -> None:
    config = load_config(NAME, overrides)
    choose_strategy(config, 2, objective=Sft())
    with pytest.raises(ConfigError, match=message):
        choose_strategy(config, 2, objective=objective())


def test_sums_over_samples_need_whole_samples() -> None:
    class Sums(Objective):
        needs = ('log_prob', 'samples')

    with pytest.raises(ConfigError, match='each rank has only a part of a sample'):
        choose_strategy(load_config(NAME, {'parallel.sequence_parallel_size': 2}), 2, objective=Sums())
