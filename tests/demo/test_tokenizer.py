"""The demo's tokenizer has InternLM-7B's published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece as spm

from demo.tokenizer import train_tokenizer

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / 'demo' / 'base.jsonl'
PUBLISHED_ELSEWHERE = {'input', 'model_prefix', 'vocab_size', 'input_format', 'num_threads', 'character_coverage',
                       'hard_vocab_limit', 'train_extremely_large_corpus'}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([DATA], tmp_path_factory.mktemp('tokenizer'), 2000)


@pytest.fixture(scope='module')
def processor(folder: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))


def read_proto(file: Path) -> object:
    pb2 = pytest.importorskip('sentencepiece.sentencepiece_model_pb2', reason='reading a model needs protobuf')
    proto = pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    return proto


def test_ids_stand_as_published(processor: spm.SentencePieceProcessor) -> None:
    assert len(processor) == 2000
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ['<unk>', '<s>', '</s>', '<0x00>', '<0xFF>']
    assert [processor.id_to_piece(i) for i in (1998, 1999)] == ['<eoh>', '<eoa>']
    assert processor.pad_id() == -1


def test_control_tokens_and_role_markers_are_found_in_text(processor: spm.SentencePieceProcessor) -> None:
    pieces = processor.encode('<|User|>:Hi<eoh>\n<|Bot|>:', out_type=str)
    assert pieces == ['<|', 'User', '|>:', 'Hi', '<eoh>', '<0x0A>', '<|', 'Bot', '|>:']


@pytest.mark.parametrize('text', [' two  spaces, kept ', '没见过的字：龘', '1234', 'tab\tand\nline', ' ', '🪨'])
def test_text_comes_back_as_it_was(processor: spm.SentencePieceProcessor, text: str) -> None:
    assert processor.decode(processor.encode(text)) == text


def test_digits_stand_alone_and_no_space_is_put_in_front(processor: spm.SentencePieceProcessor) -> None:
    assert processor.encode('12', out_type=str) == ['1', '2']


def test_the_same_text_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer([str(DATA)], tmp_path / 'elsewhere', 2000)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_the_config_is_the_published_one(folder: Path) -> None:
    config = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    assert config['tokenizer_class'] == 'InternLMTokenizer'
    assert (config['bos_token'], config['eos_token'], config['pad_token']) == ('<s>', '</s>', '</s>')
    assert (config['add_bos_token'], config['add_eos_token']) == (True, False)


def test_the_model_says_its_whole_size(folder: Path) -> None:
    proto = read_proto(folder / 'tokenizer.model')
    assert proto.trainer_spec.vocab_size == len(proto.pieces) == 2000
    assert [(p.piece, p.type, p.score) for p in proto.pieces[-2:]] == [('<eoh>', 4, 0.0), ('<eoa>', 4, 0.0)]


@pytest.mark.real
def test_the_form_is_that_of_the_real_model(folder: Path, shared_data: Path) -> None:
    ours = read_proto(folder / 'tokenizer.model')
    real = read_proto(shared_data / 'internlm-7b-tokenizer' / 'tokenizer.model')
    assert ours.normalizer_spec == real.normalizer_spec
    for field in ours.trainer_spec.DESCRIPTOR.fields:
        if field.name not in PUBLISHED_ELSEWHERE:
            assert getattr(ours.trainer_spec, field.name) == getattr(real.trainer_spec, field.name), field.name
    assert [(p.piece, p.type) for p in ours.pieces[:259]] == [(p.piece, p.type) for p in real.pieces[:259]]
    types = {p.piece: p.type for p in real.pieces if p.piece in ('<eoh>', '<eoa>')}
    assert types == {p.piece: p.type for p in ours.pieces[-2:]}


def test_a_line_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    file = tmp_path / 'bad.jsonl'
    file.write_text('{"messages": []}\n{"text": "hello"}\n', encoding='utf-8')
    with pytest.raises(ValueError, match=r'bad\.jsonl:2: expected'):
        train_tokenizer([file], tmp_path / 'out', 400)
