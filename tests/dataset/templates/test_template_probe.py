"""What is said of a tokenizer's chat template before it is used, and which tokens it is found to write."""

from __future__ import annotations

import json

import pytest

from tests.dataset.conftest import make_tokenizer
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError, ModelError
from xtuner.model.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WRONG = {
    'a number': (5, r'tokenizer_config.json: `chat_template` must be .*text.*, got 5'),
    'a truth': (True, r'`chat_template` must be .*text.*, got True'),
    'a dict of numbers': ({'default': 5}, r"`chat_template`\['default'\] has type int"),
    'a list of texts': (['a'], r'`chat_template`\[0\] must have a `name` and a `template`'),
    'a list of others': ([{'name': 'default'}], r'`chat_template`\[0\] must have a `name` and a `template`'),
    'a list of numbers': ([{'name': 'default', 'template': 1}], r'`chat_template`\[0\] must have'),
    'a name with escapes': ({'\x1b[2J\n': 5}, r'`chat_template`\[.*x1b.*\] has type int'),
    'huge': ('a' * 10**7, r'`chat_template` has 10,000,000 characters; a chat template may have 1,048,576'),
    'a huge one of a list': ([{'name': 'default', 'template': 'a' * 10**7}], r"\['default'\] has 10,000,000 ch"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(['<|im_start|>', '<|im_end|>']).save_pretrained(tmp_path)
    return tmp_path


def settings(folder, value):
    file = folder / 'tokenizer_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'chat_template': value}))


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_chat_template_is_one_line_that_names_file_and_field(case, folder):
    value, message = WRONG[case]
    settings(folder, value)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize('name', ['chat_template.jinja', 'additional_chat_templates/tool_use.jinja'])
def test_a_file_that_is_no_template_is_named(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'a' * 10**7)
    with pytest.raises(ModelError, match=f'{name} has 10,000,000 bytes; a chat template may have'):
        load_tokenizer(folder)
    (folder / name).write_bytes(b'\xff\xfe')
    with pytest.raises(ModelError, match=f'{name} cannot be read as UTF-8'):
        load_tokenizer(folder)


def test_null_and_empty_are_no_template_and_several_need_a_default(folder):
    for value in (None, ''):
        settings(folder, value)
        with pytest.raises(ConfigError, match='the tokenizer has no chat template'):
            get_template('from_tokenizer', load_tokenizer(folder))
    settings(folder, [{'name': 'rag', 'template': CHATML}])
    with pytest.raises(ConfigError, match=f"{folder}: `chat_template` has 1 templates but no 'default'"):
        get_template('from_tokenizer', load_tokenizer(folder))
    settings(
        folder, [{'name': 'default', 'template': CHATML}, {'name': 'tool_use', 'template': '{{ tools }}' + CHATML}]
    )
    assert get_template('from_tokenizer', load_tokenizer(folder)).stop == ('<|im_end|>',)


def test_the_template_for_tools_counts_in_the_hash_of_the_data(folder):
    hashes = set()
    for text in ('{{ tools }}', '{{ tools|tojson }}'):
        settings(folder, [{'name': 'default', 'template': CHATML}, {'name': 'tool_use', 'template': text + CHATML}])
        hashes.add(get_template('from_tokenizer', load_tokenizer(folder)).fingerprint())
    settings(folder, CHATML)
    hashes.add(get_template('from_tokenizer', load_tokenizer(folder)).fingerprint())
    assert len(hashes) == 3


def test_an_in_memory_template_of_a_wrong_type_is_refused():
    tokenizer = make_tokenizer([])
    for value in (5, ['a'], {'default': b'a'}):
        tokenizer.chat_template = value
        with pytest.raises(ConfigError, match='the tokenizer: `chat_template`'):
            get_template('from_tokenizer', tokenizer)
