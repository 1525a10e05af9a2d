"""Tokens that the model itself writes: those around thoughts and calls, in answers alone, and only where meant."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.conftest import ROOT
from tests.dataset.conftest import all_markers, make_tokenizer
from tests.dataset.templates.test_template_probe import CHATML
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.check import check_dataset
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.prepare import encoder_of, prepared_folder
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError, DataError

CASES = ROOT.parent / 'shared' / 'cases'
CALL = 'so <|call|>{"f": 1}<|/call|> a <eoa> b'
THOUGHT = '<think>\nhm\n</think>\n\nyes'

# Generation prompts that open the thoughts: the template shows the last answer whole, or every answer without them.
WHOLE = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
STRIPPED = WHOLE.replace('m.content', "m.content.split('</think>')[-1].lstrip('\\n')")
# As Qwen3's thinking models: the last answer always has its thoughts, were they empty.
FILLED = WHOLE.replace(
    '+ m.content +',
    "+ ('<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' "
    "if m.role == 'assistant' and loop.last else '') + m.content.split('</think>')[-1].lstrip('\\n') +",
)


def tokenizer_of(template=None, *, special_thoughts=False):
    tokenizer = make_tokenizer([*all_markers(), '<|call|>', '<|/call|>'])
    tokenizer.add_tokens(
        [AddedToken(name, special=special_thoughts, normalized=False) for name in ('<think>', '</think>')]
    )
    tokenizer.chat_template = template or CHATML
    return tokenizer


def encoded(tokenizer, messages, choice=None, template='from_tokenizer', **options):
    config = DatasetConfig(source='x', special_tokens_in_answers=choice, **options)
    encoder = encoder_of(config, tokenizer, get_template(template, tokenizer))
    [sample] = encoder.encode([to_conversation({'messages': messages}, 'file:3')])
    return sample


def turns(*texts):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


@pytest.mark.parametrize('template', ['from_tokenizer', 'internlm_chat', 'vicuna', 'moss_sft'])
def test_special_tokens_in_answers_are_ids_where_that_is_asked_for(template):
    tokenizer = tokenizer_of()
    calls = [tokenizer.convert_tokens_to_ids(name) for name in ('<|call|>', '<|/call|>')]
    messages = turns('a <|call|>', CALL, 'b <|call|>', CALL)
    plain, all_, one = (encoded(tokenizer, messages, choice, template) for choice in (None, True, ['<|call|>']))
    assert not np.isin(plain.input_ids, calls).any()
    assert all_.labels[np.isin(all_.labels, calls)].tolist() == calls * 2
    assert np.isin(all_.input_ids, calls).sum() == 4  # those of the user are text
    assert np.isin(one.input_ids, calls).sum() == 2
    assert tokenizer.decode(all_.input_ids) == tokenizer.decode(plain.input_ids)
    ends = tokenizer.convert_tokens_to_ids('<eoa>')
    if template != 'internlm_chat':  # which separates messages with it
        return
    assert [(sample.input_ids == ends).sum() for sample in (plain, all_)] == [2, 2]


def test_prompts_with_earlier_answers_are_what_training_saw():
    tokenizer = tokenizer_of()
    messages = turns('a', CALL, 'b', CALL)
    for name in ('from_tokenizer', 'internlm_chat'):
        template = get_template(name, tokenizer).allowing(True, tokenizer)
        prompt = encode_prompt(messages[:3], tokenizer, template)
        assert encoded(tokenizer, messages, True, name).input_ids[: len(prompt)].tolist() == prompt


def test_a_choice_that_cannot_be_is_refused():
    tokenizer = tokenizer_of()
    template = get_template('internlm_chat', tokenizer)
    for choice, message in ((['<nothing>'], "names '<nothing>', which is not a token of the tokenizer"),
                            (['<eoa>'], "names '<eoa>', which the template or the tokenizer uses to separate"),
                            (['</s>'], "'</s>', which the template"), ([5], '5, which is not a token')):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            template.allowing(choice, tokenizer)
    assert template.allowing(False, tokenizer) is template


def test_prepared_data_of_another_choice_is_not_taken(tmp_path):
    tokenizer = tokenizer_of()
    (tmp_path / 'data.jsonl').write_text(json.dumps({'messages': turns('a', CALL)}))
    for name in ('from_tokenizer', 'internlm_chat'):
        template = get_template(name, tokenizer)
        folders = [prepared_folder(DatasetConfig(source=str(tmp_path / 'data.jsonl'), special_tokens_in_answers=choice),
                                   tokenizer=tokenizer, template=template)
                   for choice in (None, False, True, ['<|call|>'])]  # fmt: skip
        assert folders[0] == folders[1] and len(set(folders)) == 3


def test_without_the_choice_a_note_counts_them(tmp_path):
    tokenizer = tokenizer_of()
    lines = [json.dumps({'messages': turns('a <|call|>', text)}) for text in (CALL, 'plain <eoa>', '<|call|>' * 3)]
    (tmp_path / 'data.jsonl').write_text('\n'.join(lines))
    template = get_template('internlm_chat', tokenizer)
    for choice, note in ((None, ["'<|call|>' (2 conversations)", "'<|/call|>' (1 conversation)"]), (True, [])):
        config = DatasetConfig(source=str(tmp_path / 'data.jsonl'), special_tokens_in_answers=choice)
        summary = check_dataset(config, tokenizer=tokenizer, template=template)
        found = [line for line in summary.lines() if 'special_tokens_in_answers=True' in line]
        assert len(found) == bool(note) and all(part in found[0] for part in note)


@pytest.mark.parametrize('special', [False, True])
@pytest.mark.parametrize('template', [WHOLE, STRIPPED, FILLED], ids=['whole', 'stripped', 'filled'])
def test_an_answer_whose_thoughts_the_prompt_opens_is_trained_behind_that_prompt(template, special):
    tokenizer = tokenizer_of(template, special_thoughts=special)
    messages = turns('a <think> b', THOUGHT)
    sample = encoded(tokenizer, messages, ['</think>'])
    prompt = encode_prompt(messages[:1], tokenizer, get_template('from_tokenizer', tokenizer))
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert (sample.labels[: len(prompt)] == -100).all()
    trained = sample.labels[len(prompt) :]
    assert tokenizer.decode(trained[trained >= 0]) == 'hm\n</think>\n\nyes<|im_end|>'
    opens = tokenizer.convert_tokens_to_ids('<think>')
    assert (sample.input_ids == opens).sum() == 1  # the prompt's, not the user's
    assert prompt[-2] == opens


@pytest.mark.parametrize('template', [WHOLE, STRIPPED], ids=['whole', 'stripped'])
def test_an_answer_that_does_not_begin_as_the_prompt_ends_is_refused_with_that_reason(template):
    tokenizer = tokenizer_of(template)
    message = r"file:3: the generation prompt of the chat template ends with '<think>\\n', but the answer in message 2"
    with pytest.raises(DataError, match=message):
        encoded(tokenizer, turns('a', 'yes'))
    if template == STRIPPED:
        with pytest.raises(DataError, match=r"renders answer 2 differently .*train_on = 'last_turn'"):
            encoded(tokenizer, turns('a', THOUGHT, 'b', THOUGHT))
    last = encoded(tokenizer, turns('a', THOUGHT, 'b', THOUGHT), train_on='last_turn')
    assert tokenizer.decode(last.labels[last.labels >= 0]) == 'hm\n</think>\n\nyes<|im_end|>'


def test_control_tokens_in_tools_and_in_names_of_arguments_stay_text():
    tokenizer = tokenizer_of('{{ tools|tojson }}' + CHATML.replace('m.content', 'm.content + (m.call or 0)|tojson'))
    record = {'messages': [{'role': 'user', 'content': 'a', 'call': {'<|im_end|>': 1}},
                           {'role': 'assistant', 'content': 'b', 'call': {'x': '<|im_end|>'}}],
              'tools': [{'name': '<|im_end|>', '<|im_start|>': 1}]}  # fmt: skip
    encoder = encoder_of(DatasetConfig(source='x'), tokenizer, get_template('from_tokenizer', tokenizer))
    [sample] = encoder.encode([to_conversation(record)])
    assert (sample.input_ids == tokenizer.convert_tokens_to_ids('<|im_end|>')).sum() == 2
    assert (sample.input_ids == tokenizer.convert_tokens_to_ids('<|im_start|>')).sum() == 2
    assert tokenizer.decode(sample.input_ids).count('<|im_end|>') == 5


@pytest.mark.parametrize('case', ['think_prompt', 'special_token_in_answer'])
def test_reported_cases(case):
    if not (CASES / case).is_dir():
        pytest.skip(f'{CASES} is absent: reported cases lie there where they are available')
    tokenizer = AutoTokenizer.from_pretrained(CASES / case / 'tokenizer')
    messages = json.loads((CASES / case / 'data.jsonl').read_text())['messages']
    sample = encoded(tokenizer, messages, True)
    prompt = encode_prompt(messages[:1], tokenizer, get_template('from_tokenizer', tokenizer))
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    wanted = {
        'think_prompt': ['</think>', '<|im_end|>'],
        'special_token_in_answer': ['<|action_start|>', '<|action_end|>'],
    }
    assert all(tokenizer.convert_tokens_to_ids(name) in sample.labels for name in wanted[case])
