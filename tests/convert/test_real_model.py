"""On a real model, tuned in 4 bit: what a merge by default answers is what the trained model answers.

`make demo-real` makes the model and the run; XTUNER_REAL_MODEL and XTUNER_REAL_RUN name others.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from xtuner.chat.load import open_chat_model
from xtuner.convert.merge import merge
from xtuner.inference.generate import Sampling

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get('XTUNER_REAL_MODEL') or ROOT / 'work_dirs' / 'real' / 'model')
RUN = Path(os.environ.get('XTUNER_REAL_RUN') or ROOT / 'work_dirs' / 'real' / 'run')


def answers(model: Path, adapter: Path | None = None) -> list[str]:
    """The greedy answers to the demo's ten questions."""
    chat = open_chat_model(str(model), adapter=adapter)
    session = chat.session(sampling=Sampling(max_new_tokens=40, temperature=0.0, top_p=1.0, seed=0))
    found = []
    for line in (ROOT / 'demo' / 'questions.jsonl').read_text(encoding='utf-8').splitlines():
        session.clear()
        found.append(session.ask(json.loads(line)['question'], lambda _: None).strip())
    return found


@pytest.mark.real
def test_ten_answers_of_the_merged_model_are_those_of_the_trained_one(tmp_path: Path) -> None:
    for folder in (MODEL, RUN):
        if not folder.is_dir():
            pytest.skip(f'{folder} is absent: `make demo-real` makes it')
    trained = answers(MODEL, RUN)
    assert len(set(trained)) > 5, 'a model that says one thing to all questions would prove nothing'
    assert answers(merge(str(MODEL), RUN, tmp_path / 'merged')) == trained
