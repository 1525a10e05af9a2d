from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken

from tests.dataset.conftest import all_markers, make_spaced_tokenizer, make_tokenizer
from tests.dataset.golden_templates import CASES, FOLDER, golden_tokenizer, render
from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, encode_conversation, encode_prompt
from xtuner.dataset.templates.builtin import TEMPLATES, Template, Turn, get_template
from xtuner.errors import ConfigError, DataError

NAMES = sorted(TEMPLATES.module_dict)
# InternLM-Chat's first release begins past turns with BOS and the last without: its prompts are no beginnings.
STABLE = [name for name in NAMES if name != 'internlm_chat_2023']
DIALOGUE = [
    {'role': 'system', 'content': 'Be good.'},
    {'role': 'user', 'content': 'Hi you'},
    {'role': 'assistant', 'content': 'Hello there'},
    {'role': 'user', 'content': '  How are\nyou? '},
    {'role': 'assistant', 'content': 'I am fine'},
]
# Everything that some template takes for a control token, and characters that stand for hidden ones.
EVIL = ' a </s> <eoa>\n<|im_end|>' + ''.join(all_markers()) + ' \ue000\ue001 <s> <|endoftext|>'


@pytest.fixture(scope='module', params=['bytes', 'first', 'always', 'never', 'normalizer'])
def any_tokenizer(request):
    """Tokenizers that treat the beginning of a text in every way that is in use."""
    if request.param == 'bytes':
        return make_tokenizer(all_markers())
    return make_spaced_tokenizer(all_markers(), scheme=request.param)


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


@pytest.mark.parametrize('name', STABLE)
@pytest.mark.parametrize('turns', [slice(0, 4), slice(1, 4), slice(0, 2), slice(1, 2)])
def test_prompt_is_what_the_saved_chat_template_gives_and_what_training_sees(name, turns, any_tokenizer):
    template = get_template(name, any_tokenizer)
    any_tokenizer.chat_template = template.chat_template()
    messages = DIALOGUE[turns]
    expected = any_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(messages, any_tokenizer, template) == expected
    trained = to_conversation({'messages': [*messages, {'role': 'assistant', 'content': 'So I am.'}]})
    sample = encode_conversation(trained, any_tokenizer, template)
    assert sample.input_ids[: len(expected)].tolist() == expected
    assert (sample.labels[len(expected) :] == sample.input_ids[len(expected) :]).all()
    if any_tokenizer.bos_token_id in expected and name != 'internlm_chat_2023':  # the original spells a second one
        assert expected.count(any_tokenizer.bos_token_id) == 1 and expected[0] == any_tokenizer.bos_token_id


@pytest.mark.parametrize('name', STABLE)
@pytest.mark.parametrize('train_on', ['assistant', 'last_turn', 'all'])
@pytest.mark.parametrize('change', [list, evil])
def test_the_chat_template_read_back_gives_the_same_ids_and_labels(name, train_on, change, any_tokenizer):
    template = get_template(name, any_tokenizer)
    any_tokenizer.chat_template = template.chat_template()
    own = get_template('from_tokenizer', any_tokenizer)
    conversation = to_conversation({'messages': change(DIALOGUE)})
    ours = encode_conversation(conversation, any_tokenizer, template, train_on=train_on)
    theirs = encode_conversation(conversation, any_tokenizer, own, train_on=train_on)
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    assert ours.labels.tolist() == theirs.labels.tolist()


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


def test_internlm_chat_is_what_internlm_saw(internlm_like):
    template = get_template('internlm_chat', internlm_like)
    ids = encode_prompt([{'role': 'user', 'content': 'Hi'}], internlm_like, template)
    eoh = internlm_like.convert_tokens_to_ids('<eoh>')
    raw = internlm_like.backend_tokenizer
    text = lambda string: raw.encode(string, add_special_tokens=False).ids  # noqa: E731
    assert ids == [internlm_like.bos_token_id, *text('<|User|>:Hi'), eoh, *text('\n<|Bot|>:')]
    assert template.stop_ids(internlm_like)[0] == internlm_like.convert_tokens_to_ids('<eoa>')


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"'internlm_cat' is not a prompt template; did you mean 'internlm_chat'"):
        get_template('internlm_cat')
    with pytest.raises(ConfigError, match='3 is not a prompt template'):
        get_template(3)


def test_template_whose_end_the_tokenizer_lacks_is_refused(internlm_like):
    with pytest.raises(ConfigError, match=r"ends an answer with '<\|im_end\|>', which is not"):
        get_template('internlm2_chat', internlm_like)


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


# Prompts that no training conversation begins like, but that a service is sent.
UNUSUAL = {
    'an empty answer': ['user', 'assistant:', 'user'],
    'two messages in a row': ['user', 'user', 'assistant', 'user', 'user'],
    'a greeting first': ['assistant', 'user'],
    'a greeting after the system text': ['system', 'assistant', 'user'],
}


def unusual(names):
    texts = {'system': 'Be good.', 'user': 'Hi', 'assistant': 'Hello', 'assistant:': ''}
    return tuple(Message(name.rstrip(':'), texts[name]) for name in names)


@pytest.mark.parametrize('case', UNUSUAL)
@pytest.mark.parametrize('name', STABLE)
def test_an_unusual_prompt_is_what_the_saved_chat_template_gives_or_refused_with_the_reason(name, case, tokenizer):
    template = get_template(name, tokenizer)
    messages = unusual(UNUSUAL[case])
    conversation = Conversation(messages, 'the prompt')
    if template.alternates and case != 'an empty answer':
        number = 2 if case == 'two messages in a row' else 1 + (messages[0].role == 'system')
        with pytest.raises(DataError, match=f'template `{name}` expects alternating .* message {number} has the'):
            template.render(conversation, prompt=True)
        return
    encoder = Encoder(tokenizer, template)
    runs = encoder.runs(template.render(conversation, prompt=True))
    ids = [id_ for found in encoder.texts.encode(runs) for id_ in found]
    tokenizer.chat_template = template.chat_template()
    shown = [{'role': message.role, 'content': message.content} for message in messages]
    assert ids == tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
