from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.dataset.conftest import all_markers, make_spaced_tokenizer, make_tokenizer
from tests.dataset.golden_templates import golden_tokenizer
from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, encode_conversation, encode_prompt
from xtuner.dataset.encode.text_encoder import MIDDLE, TextEncoder, TextRun
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import DataError
from xtuner.model.loading import load_tokenizer

ANSWER = Message('assistant', 'Hello there')
ASK = Message('user', 'Hi you')


def trained_text(tokenizer, messages, *, template='internlm_chat', train_on='assistant') -> str:
    sample = encode_conversation(Conversation(tuple(messages)), tokenizer, get_template(template), train_on=train_on)
    assert sample.input_ids.dtype == sample.labels.dtype == 'int64'
    assert sample.labels[0] == -100
    assert set(sample.labels[sample.labels != sample.input_ids].tolist()) <= {-100}
    return tokenizer.decode(sample.labels[sample.labels != -100])


def test_what_is_trained_is_chosen_by_train_on_and_by_each_messages_loss(internlm_like):
    second = Message('assistant', 'And you?')
    both = [ASK, ANSWER, ASK, second]
    assert trained_text(internlm_like, both) == 'Hello there<eoa>And you?<eoa>'
    assert trained_text(internlm_like, both, train_on='last_turn') == 'And you?<eoa>'
    everything = trained_text(internlm_like, both, train_on='all')
    assert everything == ('<|User|>:Hi you<eoh>\n<|Bot|>:Hello there<eoa>\n'
                          '<|User|>:Hi you<eoh>\n<|Bot|>:And you?<eoa>')  # fmt: skip
    untrained = Message('assistant', 'Hello there', loss=False)
    assert trained_text(internlm_like, [ASK, untrained, ASK, second]) == 'And you?<eoa>'
    assert trained_text(internlm_like, [Message('user', 'Hi', loss=True), ANSWER]) == 'Hi<eoh>Hello there<eoa>'


def test_a_bare_document_is_trained_whole_with_begin_and_end(internlm_like):
    sample = encode_conversation(Conversation((Message('text', 'the quick fox'),)), internlm_like,
                                 get_template('internlm_chat'))  # fmt: skip
    assert internlm_like.decode(sample.input_ids) == '<s>the quick fox</s>'
    assert (sample.labels[1:] == sample.input_ids[1:]).all()


def test_moss_writes_its_thoughts_and_calls_itself_and_results_are_given(tokenizer):
    messages = [
        ASK,
        Message('thoughts', 'look up'),
        Message('commands', 'Search("x")'),
        Message('tool', 'found'),
        ANSWER,
    ]
    assert trained_text(tokenizer, messages, template='moss_sft') == (
        '<|Inner Thoughts|>: look up<eot><|Commands|>: Search("x")<eoc><|MOSS|>: Hello there<eom>')  # fmt: skip


@pytest.mark.parametrize('tokenizer_of', [make_tokenizer, make_spaced_tokenizer])
@given(st.lists(st.text(alphabet=st.characters(blacklist_categories=['Cs']), min_size=1), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_text_keeps_prompts_prefixes_and_turns_whole(tokenizer_of, texts):
    tokenizer = _TOKENIZERS.setdefault(tokenizer_of, tokenizer_of(['<eoh>', '<eoa>']))
    template = get_template('internlm_chat', tokenizer)
    texts = [text + ('<eoa>' if len(text) % 3 == 0 else '') + 'x' for text in texts][: len(texts) // 2 * 2]
    messages = [Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts)]
    sample = encode_conversation(Conversation(tuple(messages)), tokenizer, template)
    ids = sample.input_ids.tolist()
    eoa, eoh = (tokenizer.convert_tokens_to_ids(name) for name in ('<eoa>', '<eoh>'))
    assert ids.count(eoa) == ids.count(eoh) == len(texts) // 2
    assert (sample.labels == eoa).sum() == len(texts) // 2
    for turn in range(1, len(texts), 2):  # each prompt is a beginning of the whole
        prompt = encode_prompt(messages[:turn], tokenizer, template)
        assert ids[: len(prompt)] == prompt
        assert sample.labels[len(prompt) - 1] == -100 and sample.labels[len(prompt)] == ids[len(prompt)]


_TOKENIZERS: dict = {}


def test_bytes_come_back_as_they_were(internlm_like):
    text = 'tab\t\r\n  two  spaces \u3000 \U0001f600 你好 <eoh> </s>'
    sample = encode_conversation(Conversation((Message('user', text), ANSWER)), internlm_like,
                                 get_template('internlm_chat'))  # fmt: skip
    assert f'<|User|>:{text}<eoh>' in internlm_like.decode(sample.input_ids, clean_up_tokenization_spaces=False)


def test_control_token_that_the_vocabulary_builds_from_merges_is_taken_apart():
    """Pieces that a user defined may be reachable by merges; then only checking the result helps."""
    tokenizer = make_tokenizer([])
    tokenizer.add_tokens([AddedToken('<eoa>', special=False, normalized=False)])
    tokenizer.add_tokens([AddedToken('<eoh>', special=False, normalized=False)])
    sample = encode_conversation(Conversation((Message('user', 'a<eoa>b'), ANSWER)), tokenizer,
                                 get_template('internlm_chat', tokenizer))  # fmt: skip
    assert sample.input_ids.tolist().count(tokenizer.convert_tokens_to_ids('<eoa>')) == 1
    assert 'a<eoa>b' in tokenizer.decode(sample.input_ids)


def test_control_tokens_that_eat_the_space_beside_them_are_followed():
    backend = make_tokenizer([]).backend_tokenizer
    backend.add_special_tokens([AddedToken('<|end|>', rstrip=True, normalized=False),
                                AddedToken('<|user|>', rstrip=True, lstrip=True, normalized=False),
                                AddedToken('<|assistant|>', rstrip=True, normalized=False)])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>')
    template = get_template('phi3_chat', tokenizer)
    tokenizer.chat_template = template.chat_template()
    messages = [{'role': 'user', 'content': '  Hi '}, {'role': 'assistant', 'content': 'Yes '},
                {'role': 'user', 'content': 'you'}]  # fmt: skip
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(messages, tokenizer, template) == expected


def test_a_batch_gives_what_each_alone_gives(internlm_like):
    template = get_template('internlm_chat')
    conversations = [Conversation((Message('user', 'you' * n), Message('assistant', '<eoa>' * (n % 3) + 'fine')))
                     for n in range(1, 40)]  # fmt: skip
    together = Encoder(internlm_like, template).encode(conversations)
    for conversation, sample in zip(conversations, together, strict=True):
        alone = encode_conversation(conversation, internlm_like, template)
        assert sample.input_ids.tolist() == alone.input_ids.tolist()
        assert sample.labels.tolist() == alone.labels.tolist()


def test_truncation_and_padding_left_in_the_tokenizer_are_not_applied():
    tokenizer = make_tokenizer(all_markers())
    tokenizer('Hi', truncation=True, max_length=4, padding='max_length')
    conversation = to_conversation({'messages': [{'role': 'user', 'content': 'you ' * 20},
                                                 {'role': 'assistant', 'content': 'fine'}]})  # fmt: skip
    assert len(encode_conversation(conversation, tokenizer, get_template('internlm_chat')).input_ids) > 20


def test_ids_do_not_depend_on_what_is_trained():
    """An answer never grows together with the text before it, which stood there before the model wrote anything."""
    tokenizer = golden_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert len(tokenizer.encode(':W', add_special_tokens=False)) == 1
    template = get_template('internlm_chat')
    found = set()
    for train_on in ('assistant', 'last_turn', 'all'):
        for loss in (None, True, False):
            messages = (ASK, Message('assistant', 'Who?', loss), ASK, Message('assistant', 'What?', loss))
            sample = encode_conversation(Conversation(messages), tokenizer, template, train_on=train_on)
            found.add(tuple(sample.input_ids.tolist()))
    assert len(found) == 1
    prompt = encode_prompt([ASK], tokenizer, template)
    assert tokenizer.decode(prompt[-1:]) == ':' and found.pop()[: len(prompt)] == tuple(prompt)


def test_names_of_tokens_in_a_text_are_text(internlm_like):
    messages = [Message('system', '{bos}'), Message('user', '{eos}{round}'), Message('assistant', '{eos}')]
    text = trained_text(internlm_like, messages)
    assert text == '{eos}<eoa>'
    ids = encode_prompt(messages[:2], internlm_like, get_template('internlm_chat'))
    assert internlm_like.decode(ids) == '<s><|System|>:{bos}\n<|User|>:{eos}{round}<eoh>\n<|Bot|>:'


def test_a_prompt_must_not_end_with_an_answer(internlm_like):
    with pytest.raises(DataError, match='the prompt ends with an answer'):
        encode_prompt([ASK, ANSWER], internlm_like, get_template('internlm_chat'))


@pytest.mark.real
def test_ids_of_internlm_are_the_tokenizers_own(shared_data):
    """The encoder replaces spaces itself; what it encodes is what the tokenizer would have made of it."""
    tokenizer = load_tokenizer(shared_data / 'internlm-7b-tokenizer')
    encoder = TextEncoder(tokenizer, {'<eoa>': 103028, '</s>': 2})
    assert encoder._space == '▁'
    rows = [json.loads(line) for line in (shared_data / 'gsm8k_test.jsonl').open(encoding='utf-8')]
    texts = [row['question'] + '  \n ▁' + row['answer'] for row in rows] + [
        '',
        ' ',
        '▁ ▁',
        '\0 \t x',
        '<TOKENS_UNUSED_2> x',
    ]
    runs = [TextRun(text, MIDDLE, True) for text in texts]
    assert encoder.encode(runs) == tokenizer(texts, add_special_tokens=False).input_ids
    spelt = ['a </s> b', '<eoa> </s>', 'x  <eoa>']
    for text, ids in zip(spelt, encoder.encode([TextRun(text, MIDDLE, True) for text in spelt]), strict=True):
        assert not {2, 103028} & set(ids)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_two_encoders_of_one_tokenizer_do_not_disturb_each_other(internlm_like):
    """Settings that encoding needs are the encoder's own, or put back."""
    tokenizer = make_spaced_tokenizer(['<eoa>'], scheme='normalizer')
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(' ', '▁')
    encoder = TextEncoder(tokenizer, {'<eoa>': tokenizer.convert_tokens_to_ids('<eoa>')})
    before = tokenizer('Hello <eoa> you', add_special_tokens=False).input_ids
    [ids] = encoder.encode([TextRun('Hello <eoa> you', MIDDLE, True)])
    assert ids != before
    assert tokenizer('Hello <eoa> you', add_special_tokens=False).input_ids == before
    assert tokenizer.backend_tokenizer.normalizer is not None
