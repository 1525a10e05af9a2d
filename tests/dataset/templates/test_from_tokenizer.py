"""A tokenizer's own chat template."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from tests.dataset.conftest import make_tokenizer
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_conversation
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError, DataError


def test_from_tokenizer_needs_a_chat_template_that_ends_answers():
    tokenizer = make_tokenizer([])
    with pytest.raises(ConfigError, match='has no chat template'):
        get_template('from_tokenizer', tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match='does not end an answer with a token'):
        get_template('from_tokenizer', tokenizer)
    with pytest.raises(ConfigError, match='requires the tokenizer'):
        get_template('from_tokenizer')


def test_from_tokenizer_refuses_answers_that_change_once_more_follows():
    """Such as templates that leave an earlier answer's thoughts out."""
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q:{{ m['content'] }}{% else %}A:"
        "{{ m['content'] if loop.last else m['content'].split('/think ')[-1] }}<|end|>{% endif %}{% endfor %}"
        '{% if add_generation_prompt %}A:{% endif %}'
    )
    template = get_template('from_tokenizer', tokenizer)
    messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b/think c'}] * 2
    conversation = to_conversation({'messages': messages}, 'file:3')
    with pytest.raises(DataError, match=r"file:3: the chat template renders answer 2 .*train_on = 'last_turn'"):
        encode_conversation(conversation, tokenizer, template)
    sample = encode_conversation(conversation, tokenizer, template, train_on='last_turn')
    assert tokenizer.decode(sample.input_ids) == 'Q:aA:c<|end|>Q:aA:b/think c<|end|>'
    assert tokenizer.decode(sample.input_ids[sample.labels != -100]) == 'b/think c<|end|>'


def test_from_tokenizer_shows_tools_and_names_what_the_template_refuses():
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['name'] }};{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "[{{ c['name'] }}]{% endfor %}<|end|>{% endfor %}"
    )
    template = get_template('from_tokenizer', tokenizer)
    record = {'messages': [{'role': 'user', 'content': 'sum'},
                           {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'add<|end|>'}]}],
              'tools': [{'name': 'add'}]}  # fmt: skip
    sample = encode_conversation(to_conversation(record), tokenizer, template)
    assert tokenizer.decode(sample.input_ids) == 'add;sum<|end|>[add<|end|>]<|end|>'
    assert tokenizer.decode(sample.input_ids[sample.labels != -100]) == '[add<|end|>]<|end|>'
    assert sample.input_ids.tolist().count(tokenizer.convert_tokens_to_ids('<|end|>')) == 2
    record['messages'].append({'role': 'tool', 'content': '3'})
    with pytest.raises(DataError, match='file:1: the chat template rejects the conversation: no tools here'):
        encode_conversation(to_conversation(record, 'file:1'), tokenizer, template)


def test_from_tokenizer_takes_tokens_that_the_template_writes_for_control_tokens_whatever_they_are_called():
    tokenizer = make_tokenizer([])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ('<eoh>', '<eoa>', '<think>')])
    ours = get_template('internlm_chat', tokenizer)
    tokenizer.chat_template = ours.chat_template()
    own = get_template('from_tokenizer', tokenizer)
    assert own.stop_ids(tokenizer) == ours.stop_ids(tokenizer)
    messages = [{'role': 'user', 'content': 'a <eoa> b'}, {'role': 'assistant', 'content': '<think>c'}]
    theirs, sample = (encode_conversation(to_conversation({'messages': messages}), tokenizer, t) for t in (own, ours))
    assert theirs.input_ids.tolist() == sample.input_ids.tolist()
    assert theirs.labels.tolist() == sample.labels.tolist()
    assert tokenizer.convert_tokens_to_ids('<think>') in sample.labels  # means itself: no template writes it
