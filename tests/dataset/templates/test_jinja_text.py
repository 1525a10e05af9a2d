"""The chat template that is saved with a model."""

from __future__ import annotations

import pytest

from tests.dataset.templates.test_builtin import DIALOGUE, NAMES, evil
from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, encode_conversation, encode_prompt
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import DataError

# InternLM-Chat's first release begins past turns with BOS and the last without: its prompts are no beginnings.
STABLE = [name for name in NAMES if name != 'internlm_chat_2023']


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
