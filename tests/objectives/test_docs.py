"""The examples of docs/objectives.md, as a reader would copy them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.objectives.test_model import LENGTHS, adapted, make_batch, plain_samples
from xtuner.cli.main import main
from xtuner.config.flatten import flatten
from xtuner.config.load import load_config
from xtuner.objectives.base import FIELDS
from xtuner.objectives.load import make_objective
from xtuner.objectives.model import TrainingModel

TEXT = (ROOT / 'docs' / 'objectives.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
SECTIONS = [block for block in BLOCKS if 'objective = dict(' in block]


def test_there_are_examples() -> None:
    assert len(SECTIONS) == 4
    assert len(BLOCKS) == 8


@pytest.fixture(autouse=True)
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds the file of all examples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_losses.py').write_text('\n'.join(b for b in BLOCKS if b not in SECTIONS), encoding='utf-8')


@pytest.mark.parametrize('section', SECTIONS, ids=lambda text: re.findall(r':(\w+)', text)[0])
def test_an_example_trains(section: str, tmp_path: Path) -> None:
    base = flatten(load_config('internlm_7b_qlora_oasst1'), title='base').replace("objective = 'sft'", '')
    (tmp_path / 'config.py').write_text(base + section, encoding='utf-8')
    objective = make_objective(load_config('config.py').objective)
    model, batch = TrainingModel(adapted('llama'), objective), make_batch()
    statistics = model(**batch, only_statistics=True) if 'Centred' in section else None
    loss = model(**batch, statistics=statistics)
    loss.backward()
    assert loss.item() > 0
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_command_line_without_a_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = re.findall(r'```bash\n(xtuner print-config internlm.*?)```', TEXT, re.DOTALL)[0]
    words = shlex.split(line.replace('\\\n', ''))[1:]
    assert main(words) == 0
    assert 'smoothing=0.2' in capsys.readouterr().out
    assert main([word.replace('sum_log_probs', 'sum_log_prob') for word in words]) == 1


def test_the_mean_over_samples_is_one_by_its_definition() -> None:
    objective = make_objective('my_losses.py:PerSample')
    batch = make_batch()
    batch['labels'][0, : LENGTHS[0][0]] = -100  # the first sample has no target
    llm = adapted('llama')
    loss = TrainingModel(llm, objective)(**batch)
    nlls = [-sample.log_prob.mean() for sample in plain_samples(llm, batch) if len(sample.targets)]
    assert objective.weight(batch) == len(nlls) == sum(map(len, LENGTHS)) - 1
    assert loss.item() == pytest.approx(sum(nlls).item(), rel=1e-5)


def test_every_value_is_explained() -> None:
    table = TEXT.split('## What `rows` offers')[1].split('##')[0]
    assert set(re.findall(r'^\| `(\w+)` \|', table, re.MULTILINE)) == set(FIELDS)
