"""The model card: metadata that the hub reads, nothing of this machine, text that cannot break out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hostile_text import COMMANDS, FRONT_MATTER, HOSTILE, obeyed
from xtuner.adapters.attach import Provenance
from xtuner.tracking.model_card import hub_id, prompt_example, public_name, render_card, write_card

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


def test_every_text_of_a_stranger_stays_text() -> None:
    """An adapter's `xtuner.json` is anybody's; the card of a merged model is made from it."""
    training: dict[str, Any] = dict.fromkeys(('method', 'optimizer', 'precision', 'decay'), HOSTILE)
    training |= {'data': [HOSTILE], 'versions': {HOSTILE: HOSTILE}, 'adapter': [HOSTILE]}
    base = f'x; rm -rf ~{COMMANDS}{FRONT_MATTER}'.replace('/', '')
    hostile = Provenance(base=base, base_fingerprint='`<b>' + HOSTILE,
                         template=HOSTILE, compute_dtype='bf16', xtuner=HOSTILE, training=training)  # fmt: skip
    markdown = pytest.importorskip('markdown_it', reason='reads the card as the hub does').MarkdownIt().enable('table')
    for kind in ('adapter', 'merged', 'full'):
        text = render_card(hostile, kind=kind, example=f'{HOSTILE}\n```\n')
        assert 'clear' in text and not obeyed(text)
        found = metadata(text)
        assert 'license' not in found and 'base_model' not in found
        body = text.split('\n---\n', 1)[1]
        html = re.sub(r'<code.*?</code>', '', markdown.render(body), flags=re.DOTALL)
        assert set(re.findall(r'<(\w+)', html)) <= {'h1', 'h2', 'p', 'pre', 'table', 'thead', 'tbody', 'tr', 'th', 'td'}
        prose = re.sub(r'(`+)(?!`).+?(?<!`)\1(?!`)', '', body, flags=re.DOTALL)
        assert '://' not in prose and 'www.' not in prose, 'GitHub makes links of bare addresses'
    assert "xtuner chat 'x; rm -rf " in render_card(hostile, kind='adapter')


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
    from xtuner.dataset.templates.builtin import get_template
    from xtuner.model.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(tiny_internlm)
    tokenizer.chat_template = None
    assert prompt_example(tokenizer) == ''
    tokenizer.chat_template = get_template('internlm_chat', tokenizer).chat_template()
    assert prompt_example(tokenizer).endswith('<|User|>:What is LoRA?<eoh>\n<|Bot|>:')
