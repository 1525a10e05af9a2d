"""The model card: metadata that the hub reads, nothing of this machine, text that cannot break out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from xtuner.model.adapter import Provenance
from xtuner.model.card import hub_id, prompt_example, public_name, render_card, write_card

PROVENANCE = Provenance(
    base='internlm/internlm-7b', base_fingerprint='0123456789abcdef0123', template='internlm_chat',
    compute_dtype='bf16', quantization={'bits': 4},
    training={'method': 'QLoRA, rank 64', 'data': ['timdettmers/openassistant-guanaco', '/home/anna/secret/own.jsonl'],
              'conversations': 9846, 'learning_rate': 2e-4, 'loss': 1.23456, 'adapter': {'r': 64, 'lora_alpha': 16}},
)  # fmt: skip


def metadata(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_the_hub_reads_it() -> None:
    found = metadata(render_card(PROVENANCE, kind='adapter'))
    assert found['base_model'] == 'internlm/internlm-7b'
    assert found['base_model_relation'] == 'adapter'
    assert found['library_name'] == 'peft'
    assert found['pipeline_tag'] == 'text-generation'
    assert found['datasets'] == ['timdettmers/openassistant-guanaco']
    assert {'lora', 'qlora', 'xtuner'} <= set(found['tags'])
    merged = metadata(render_card(PROVENANCE, kind='merged'))
    assert (merged['library_name'], merged['base_model_relation']) == ('transformers', 'finetune')


def test_nothing_of_the_machine_is_in_it() -> None:
    local = replace(PROVENANCE, base='/home/anna/models/internlm-7b')
    text = render_card(local, kind='adapter')
    assert 'anna' not in text
    assert 'own.jsonl' in text
    assert 'base_model' not in metadata(text)
    assert 'xtuner chat internlm-7b --adapter' in text


def test_text_cannot_break_out() -> None:
    training = {'method': 'a | b\n\n# <script>', 'data': ['[x](javascript:y)']}
    text = render_card(replace(PROVENANCE, training=training), kind='adapter', example='```\n````\n# out')
    assert '| method | a \\| b # \\<script\\> |' in text
    assert '`````\n```\n````\n# out\n`````' in text
    assert '\\[x\\]' in text


def test_ids_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id('owner/name') == 'owner/name'
    for name in ('/a/b', './a/b', 'a/b/c', 'name', '~/b', 'modelscope:a/b', '../b'):
        assert hub_id(name) is None, name
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'owner' / 'name').mkdir(parents=True)
    assert hub_id('owner/name') is None
    assert public_name('owner/name') == 'name'


def test_an_adapter_without_a_story_has_a_card_too(tmp_path: Path) -> None:
    write_card(tmp_path, replace(PROVENANCE, training=None), kind='adapter')
    text = (tmp_path / 'README.md').read_text(encoding='utf-8')
    assert '## Training' not in text
    assert '## Use' in text


def test_prompt_example_is_the_template_s(tiny_internlm: Path) -> None:
    from xtuner.dataset.template import get_template
    from xtuner.model.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(tiny_internlm)
    tokenizer.chat_template = None
    assert prompt_example(tokenizer) == ''
    tokenizer.chat_template = get_template('internlm_chat', tokenizer).chat_template()
    assert prompt_example(tokenizer).endswith('<|User|>:What is LoRA?<eoh>\n<|Bot|>:')
