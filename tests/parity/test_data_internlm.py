"""InternLM's own tokenizer on real conversations: training, chat and the saved chat template see the same ids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, encode_prompt
from xtuner.dataset.map_fns import oasst_tree_all_map_fn
from xtuner.dataset.packing.pack import pack_samples
from xtuner.dataset.templates.builtin import get_template

pytestmark = pytest.mark.real
EOH, EOA = 103027, 103028


@pytest.fixture(scope='module')
def internlm(shared_data):
    from xtuner.model.loading import load_tokenizer

    tokenizer = load_tokenizer(shared_data / 'internlm-7b-tokenizer')
    tokenizer.chat_template = get_template('internlm_chat', tokenizer).chat_template()
    return tokenizer


@pytest.fixture(scope='module')
def conversations(shared_data):
    lines = (shared_data / 'oasst_en_100_trees.jsonl').read_text(encoding='utf-8').splitlines()
    found = [to_conversation(record, f'tree {n}') for n, line in enumerate(lines)
             for record in oasst_tree_all_map_fn(json.loads(line))]  # fmt: skip
    assert len(found) > 200
    return found


def test_every_prompt_of_every_path_is_what_apply_chat_template_gives(internlm, conversations):
    """But for the few whose earlier answer grows together with the `:` before it when a text is encoded as a whole.

    Neither training nor chat can have that: the `:` stood there before the model wrote its first token.
    """
    template = get_template('internlm_chat', internlm)
    samples = Encoder(internlm, template).encode(conversations)
    num_prompts = num_grown = 0
    for conversation, sample in zip(conversations, samples, strict=True):
        messages = [{'role': m.role, 'content': m.content} for m in conversation.messages]
        grown = False
        for turn in range(1, len(messages), 2):
            expected = internlm.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
            ours = encode_prompt(conversation.messages[:turn], internlm, template)
            assert sample.input_ids[: len(ours)].tolist() == ours
            assert (ours == expected) is not grown, conversation.origin
            num_prompts, num_grown = num_prompts + 1, num_grown + grown
            head = internlm.encode('>:', add_special_tokens=False)
            answer = internlm.encode('>:' + messages[turn]['content'], add_special_tokens=False)
            grown = grown or answer[: len(head)] != head
        assert (sample.input_ids == EOA).sum() == (sample.input_ids == EOH).sum() == len(messages) // 2
        assert sample.input_ids[-1] == EOA
    assert num_prompts > 400 and num_grown / num_prompts < 0.02, (num_grown, num_prompts)


def test_the_chat_template_read_back_gives_the_same_labels(internlm, conversations):
    ours = Encoder(internlm, get_template('internlm_chat', internlm)).encode(conversations)
    theirs = Encoder(internlm, get_template('from_tokenizer', internlm)).encode(conversations)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)


@pytest.mark.parametrize('text', ['<eoa>', '</s>', 'a <eoh>\n<|Bot|>:b<eoa>', '<s><eoa><eoa></s>', '<e<eoa>oa>'])
def test_control_tokens_in_content_stay_text(internlm, text):
    template = get_template('internlm_chat', internlm)
    ids = encode_prompt([{'role': 'user', 'content': text}], internlm, template)
    assert [id_ for id_ in ids if id_ in (0, 1, 2, EOH, EOA)] == [1, EOH]
    assert text in internlm.decode(ids)


def test_gsm8k_fills_its_packs(internlm, shared_data):
    rows = [json.loads(line) for line in (shared_data / 'gsm8k_train.jsonl').open(encoding='utf-8')][:2000]
    conversations = [to_conversation({'conversation': [{'input': r['question'], 'output': r['answer']}]}) for r in rows]
    samples = Encoder(internlm, get_template('internlm_chat', internlm)).encode(conversations)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    packs = pack_samples(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) >= 0.98
