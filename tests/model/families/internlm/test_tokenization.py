"""InternLM's tokenizer against sentencepiece itself: ids and texts, on the real vocabulary and on a small one."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.model.families.internlm.original import OriginalTokenizer
from tests.model.published import pieces, write_tokenizer
from xtuner.errors import ModelError
from xtuner.model.families.internlm.tokenization import InternLMTokenizer, utf8
from xtuner.model.loading import load_tokenizer

RUNS = ' -=*._#/\\~+:!?a0\t\n\r的'
CONTROL = ['<eoh>', '<eoa>', '<s>', '</s>', '<unk>', '<|User|>:', '<|Bot|>:', '<TOKENS_UNUSED_2>', '<0x41>', '▁', '\0']
characters = st.characters(exclude_categories=['Cs'])
words = st.one_of(
    st.text(characters, max_size=30),
    st.text('abcdefghij ,.\n0123456789', max_size=40),
    st.sampled_from(CONTROL),
    st.builds(lambda c, n: c * n, st.sampled_from(RUNS), st.integers(1, 60)),
)
texts = st.lists(words, max_size=8).map(''.join)


@pytest.fixture(scope='module')
def folder(shared_data: Path) -> Path:
    return shared_data / 'internlm-7b-tokenizer'


@pytest.fixture(scope='module')
def ours(folder: Path) -> InternLMTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope='module')
def original(folder: Path) -> OriginalTokenizer:
    return OriginalTokenizer(folder)


@pytest.mark.real
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(text=texts)
def test_ids_and_texts_of_anything(ours: InternLMTokenizer, original: OriginalTokenizer, text: str) -> None:
    ids = original.encode(text)
    assert ours(text).input_ids == ids
    assert ours.decode(ids) == original.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)


@pytest.mark.real
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 103167)), max_size=12))
def test_texts_of_any_ids(ours: InternLMTokenizer, original: OriginalTokenizer, ids: list[int]) -> None:
    assert ours.decode(ids) == original.decode(ids)


@pytest.mark.real
def test_ids_of_ten_thousand_texts(ours: InternLMTokenizer, original: OriginalTokenizer, shared_data: Path) -> None:
    """Real conversations, vocabulary strewn at random, and runs of one character: where equal scores meet."""
    rows = [json.loads(line) for line in (shared_data / 'gsm8k_train.jsonl').open(encoding='utf-8')]
    found = [row[key] for row in rows[:2500] for key in ('question', 'answer')]
    draw = random.Random(0)
    vocabulary = [original.sp.id_to_piece(i).replace('▁', ' ') for i in range(259, len(original.sp))]
    found += [''.join(draw.choices(vocabulary, k=8)) for _ in range(4000)]
    found += [''.join(draw.choices(RUNS, k=30)) for _ in range(1000)]
    found += [character * length for character in RUNS for length in range(1, 80)]
    found += [
        ' ' * n + word for n in range(1, 60) for word in ('もし', 'a', '的')
    ]  # pieces of equal score overlap here
    assert len(found) >= 10000
    assert [t for t, ids in zip(found, ours(found).input_ids, strict=True) if ids != original.encode(t)] == []


@pytest.mark.real
def test_what_is_known_of_the_vocabulary(ours: InternLMTokenizer) -> None:
    assert len(ours) == ours.vocab_size == 103168
    assert ours('Hello').input_ids == [1, 9843]
    assert ours.convert_ids_to_tokens([9843]) == ['Hello']  # not '▁Hello'
    assert ours('a<eoh>\n<eoa>').input_ids == [1, 264, 103027, 364, 103028]
    assert ours.decode([103027, 1, 103028], skip_special_tokens=True) == '<eoh><eoa>'
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 2, 0)
    assert ours('<s></s><unk>', add_special_tokens=False).input_ids == [1, 2, 0]


@pytest.mark.real
def test_saved_and_loaded_again(ours: InternLMTokenizer, folder: Path, tmp_path: Path) -> None:
    text = 'Hello ,  world <eoa>\n\0</s>'
    ours.save_pretrained(tmp_path)
    assert (tmp_path / 'tokenizer.model').read_bytes() == (folder / 'tokenizer.model').read_bytes()
    again = load_tokenizer(tmp_path)
    assert type(again) is InternLMTokenizer
    assert again(text).input_ids == ours(text).input_ids
    assert again.decode(again(text).input_ids) == ours.decode(ours(text).input_ids)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert type(plain) is not InternLMTokenizer
    assert plain(text).input_ids == ours(text).input_ids


@pytest.mark.real
def test_decoding_can_keep_every_space(ours: InternLMTokenizer) -> None:
    ids = ours("so , it is n't .", add_special_tokens=False).input_ids
    assert ours.decode(ids) == "so, it isn't."
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == "so , it is n't ."


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12))
def test_utf8_has_a_mark_for_each_stray_byte(data: bytes) -> None:
    text = utf8(data)
    assert text.encode().count('\ufffd'.encode()) >= text.count('\ufffd')
    if text.count('\ufffd') == 0:
        assert text.encode() == data
    assert utf8('né😀'.encode() + b'\xf0\x9f\x98') == 'né😀' + 3 * '\ufffd'


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.mark.parametrize(
    'text', ['', ' ', 'Hello', '  the cat\n\n\tsat', '<eoh>x<eoa>', 'a</s>b', '語 é \x07 \0', 'on the mat']
)
def test_small_vocabulary(small: Path, text: str) -> None:
    original = OriginalTokenizer(small)
    ours = load_tokenizer(small)
    assert ours(text).input_ids == original.encode(text)
    assert ours.decode(original.encode(text)) == original.decode(original.encode(text))


def test_a_plain_batch_is_what_its_texts_are(small: Path) -> None:
    """A batch takes a shorter way; it must not show, nor see what an earlier call left behind."""
    ours, again = load_tokenizer(small), load_tokenizer(small)
    batch = ['', 'the cat sat', '<eoh>x</s>', '  語 é\0']
    ours(batch, padding='max_length', truncation=True, max_length=3)
    for options in ({}, {'add_special_tokens': False}):
        made = ours(batch, **options)
        assert dict(made) == {key: [again(text, **options)[key] for text in batch] for key in again('a')}
        assert dict(made) == dict(again(batch, verbose=True, **options))  # an option more: transformers' own way
    ours.split_special_tokens = True
    assert 2 not in ours(batch).input_ids[2]
    assert ours(batch, return_offsets_mapping=True).char_to_token(1, 0) == 1
    assert len(ours(batch, padding=True, return_tensors='pt').input_ids) == 4


def test_a_batch_that_is_too_long_is_warned_of(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = load_tokenizer(small)
    ours.model_max_length = 4
    logger = logging.getLogger('transformers')
    logger.addHandler(caplog.handler)
    try:
        assert len(ours(['the cat sat on the mat']).input_ids[0]) > 4
    finally:
        logger.removeHandler(caplog.handler)
    assert 'longer than the specified maximum' in caplog.text


def test_added_tokens_survive(small: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(small)
    ours.add_tokens(['<tool>'])
    ours.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again('a<tool>').input_ids[-1] == len(pieces(small)) == len(again) - 1
    assert again.decode(again('a<tool>').input_ids, skip_special_tokens=True) == 'a<tool>'


def test_options_of_the_published_config(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / 'copy')
    settings_file = folder / 'tokenizer_config.json'
    settings_file.write_text(
        json.dumps(json.loads(settings_file.read_text()) | {'add_bos_token': False, 'add_eos_token': True})
    )
    ours = load_tokenizer(folder)
    ids = ours('Hello').input_ids
    assert ids[0] != 1
    assert ids[-1] == 2
    ours.save_pretrained(tmp_path / 'saved')
    assert load_tokenizer(tmp_path / 'saved')('Hello').input_ids == ids


def test_bad_files(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='contains no tokenizer'):
        load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes((small / 'tokenizer.model').read_bytes()[:1000])
    with pytest.raises(ModelError, match=r'tokenizer\.model is not a sentencepiece'):
        load_tokenizer(tmp_path)
