from __future__ import annotations

import json

import numpy as np
import pytest

from tests.dataset.conftest import all_markers
from tests.dataset.golden_templates import CASES, FOLDER, golden_tokenizer, render
from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_conversation
from xtuner.dataset.templates.builtin import TEMPLATES, Template, Turn, get_template
from xtuner.errors import ConfigError, DataError

NAMES = sorted(TEMPLATES.module_dict)
DIALOGUE = [
    {'role': 'system', 'content': 'Be good.'},
    {'role': 'user', 'content': 'Hi you'},
    {'role': 'assistant', 'content': 'Hello there'},
    {'role': 'user', 'content': '  How are\nyou? '},
    {'role': 'assistant', 'content': 'I am fine'},
]
# Everything that some template takes for a control token, and characters that stand for hidden ones.
EVIL = ' a </s> <eoa>\n<|im_end|>' + ''.join(all_markers()) + ' \ue000\ue001 <s> <|endoftext|>'


@pytest.fixture(scope='module')
def golden():
    return golden_tokenizer()


def evil(messages):
    return [{**message, 'content': message['content'] + EVIL} for message in messages]


@pytest.mark.parametrize('name', NAMES)
def test_golden_ids_and_masks(name, golden):
    expected = json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))
    assert render(name, golden) == expected
    assert set(expected) == {'stop_ids', *CASES}


def test_every_golden_file_has_its_template():
    assert sorted(file.stem for file in FOLDER.glob('*.json')) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_control_tokens_in_content_stay_text(name, any_tokenizer):
    template = get_template(name, any_tokenizer)
    plain = encode_conversation(to_conversation({'messages': DIALOGUE}), any_tokenizer, template)
    spelt = encode_conversation(to_conversation({'messages': evil(DIALOGUE)}), any_tokenizer, template)
    controls = [id_ for id_, token in any_tokenizer.added_tokens_decoder.items() if token.special]
    controls.remove(any_tokenizer.convert_tokens_to_ids('<unk>'))
    assert spelt.input_ids[np.isin(spelt.input_ids, controls)].tolist() == \
        plain.input_ids[np.isin(plain.input_ids, controls)].tolist()  # fmt: skip
    assert len(spelt.input_ids) > len(plain.input_ids) + 5 * 40


@pytest.mark.parametrize('name', NAMES)
def test_every_answer_is_trained_with_its_end_even_where_pad_is_eos(name, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    template = get_template(name, tokenizer)
    sample = encode_conversation(to_conversation({'messages': DIALOGUE}), tokenizer, template)
    trained = sample.labels != -100
    ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
    assert len(ends) == 2
    for end in ends:
        assert sample.labels[end] in template.stop_ids(tokenizer)
    assert len(sample.input_ids) == ends[-1] + 1  # nothing is left behind the last end


@pytest.mark.parametrize('name', NAMES)
def test_generation_stops_at_the_token_that_ends_an_answer_first(name, tokenizer):
    assert tokenizer.eos_token_id in get_template(name, tokenizer).stop_ids(tokenizer)


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"'internlm_cat' is not a prompt template; did you mean 'internlm_chat'"):
        get_template('internlm_cat')
    with pytest.raises(ConfigError, match='3 is not a prompt template'):
        get_template(3)


def test_template_whose_end_the_tokenizer_lacks_is_refused(internlm_like):
    with pytest.raises(ConfigError, match=r"ends an answer with '<\|im_end\|>', which is not"):
        get_template('internlm2_chat', internlm_like)


def test_a_template_refuses_what_it_has_no_form_for(tokenizer):
    template = get_template('internlm_chat')
    user, answer = Message('user', 'a'), Message('assistant', 'b')
    with pytest.raises(DataError, match=r"file:1: template `internlm_chat` does not support the role 'tool'"):
        template.render(Conversation((user, answer, Message('tool', 'c')), 'file:1'))
    with pytest.raises(DataError, match='does not support tool calls'):
        template.render(Conversation((user, Message('assistant', 'b', extra={'tool_calls': [1]})), 'file:1'))
    with pytest.raises(DataError, match='does not support `tools`'):
        template.render(Conversation((user, answer), 'file:1', tools=({},)))
    with pytest.raises(DataError, match='puts the system text into the next user message'):
        get_template('gemma').render(Conversation((Message('system', 's'), answer)))


def test_a_template_of_ones_own_is_one_entry(tokenizer):
    mine = Template('mine', {'user': Turn('Q: ', '\n'), 'assistant': Turn('A:', '{eos}', lead=' ')})
    sample = encode_conversation(Conversation((Message('user', 'a'), Message('assistant', 'b'))), tokenizer, mine)
    assert tokenizer.decode(sample.input_ids) == '<s>Q: a\nA: b</s>'
    assert tokenizer.decode(sample.input_ids[sample.labels != -100]) == ' b</s>'
    assert get_template(mine, tokenizer) is mine
    assert mine.fingerprint() != get_template('default').fingerprint()
