"""No record's treatment depends on another's: shuffled, and with others dropped, each record gives the same ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataset.conftest import all_markers, make_spaced_tokenizer, make_tokenizer
from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.encode.conversation_encoder import Encoder
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import DataError

# A template that shows what it is given beside the texts, refuses one role, and writes its answers between tokens.
OWN = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}{% if m.role == 'tool' and not m.name %}"
    "{{ raise_exception('a tool without a name') }}{% endif %}<|im_start|>{{ m.role }}:{{ m.content }}"
    '{% for call in m.tool_calls or [] %}[{{ call }}]{% endfor %}<|im_end|>{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}'
)
TOKENIZERS = {'bytes': make_tokenizer(all_markers()), 'spaces': make_spaced_tokenizer(all_markers(), scheme='always')}
for _tokenizer in TOKENIZERS.values():
    _tokenizer.chat_template = OWN

texts = st.sampled_from(
    ['', 'Hi', ' you ', 'a <eoa> b', '<|im_end|>', '</s>', '\n', '\0001\0', '你好', '{bos}', '\ue000', 'x' * 70]
)
extras = st.sampled_from([{}, {'name': 'add'}, {'tool_calls': ['add']}, {'name': 'add', 'tool_calls': ['a<|im_end|>']},
                          {'tool_calls': []}, {'reasoning_content': 'hm'}])  # fmt: skip
losses = st.sampled_from([None, True, False])


@st.composite
def conversations(draw):
    messages = [Message('system', draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append(Message('user', draw(texts), draw(losses), draw(extras)))
        messages.append(Message('assistant', draw(texts) or 'y', draw(losses), draw(extras)))
        if draw(st.integers(0, 4)) == 0:
            messages.append(Message('tool', draw(texts), None, draw(extras)))
            messages.append(Message('assistant', 'so', None, {}))
    tools = ({'name': draw(texts)},) if draw(st.integers(0, 5)) == 0 else ()
    return Conversation(tuple(messages), 'file:1', tools)


def outcome(sample):
    if isinstance(sample, DataError):
        return str(sample)
    return sample.input_ids.tolist(), sample.labels.tolist()


@pytest.mark.parametrize('tokenizer', TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    'name', ['internlm_chat', 'vicuna', 'gemma', 'chatglm2', 'internlm_chat_2023', 'from_tokenizer']
)
@given(st.lists(conversations(), min_size=2, max_size=12), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_record_gives_the_same_ids_whatever_stands_around_it(name, tokenizer, records, rng, spelt):
    template = get_template(name, tokenizer).allowing(spelt, tokenizer)
    alone = [outcome(Encoder(tokenizer, template).encode_each([record])[0]) for record in records]
    order = rng.sample(range(len(records)), rng.randint(1, len(records)))
    encoder = Encoder(tokenizer, template)
    cut = rng.randint(0, len(order))
    together = [encoder.encode_each([records[i] for i in part]) for part in (order[:cut], order[cut:])]
    assert [outcome(sample) for part in together for sample in part] == [alone[i] for i in order]
