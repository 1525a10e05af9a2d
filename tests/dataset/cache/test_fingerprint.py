"""Prepared data must not be taken for another tokenizer's."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo.tokenizer import train_tokenizer
from tests.conftest import ROOT
from tests.dataset.conftest import make_tokenizer
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.cache.fingerprint import fingerprint_tokenizer
from xtuner.dataset.prepare import prepared_folder
from xtuner.dataset.templates.builtin import get_template
from xtuner.model.loading import load_tokenizer


def test_it_changes_with_whatever_changes_the_ids(tiny_internlm: Path, tmp_path: Path) -> None:
    first = fingerprint_tokenizer(load_tokenizer(tiny_internlm))
    for name in ('tokenizer.model', 'tokenizer_config.json'):
        shutil.copyfile(tiny_internlm / name, tmp_path / name)
    assert fingerprint_tokenizer(load_tokenizer(tmp_path)) == first, 'another folder, the same tokenizer'

    grown = load_tokenizer(tiny_internlm)
    grown.add_tokens(['<new>'])
    lowered = load_tokenizer(tiny_internlm)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    renamed = load_tokenizer(tiny_internlm)
    renamed.pad_token = '<eoa>'
    train_tokenizer([ROOT / 'demo' / 'base.jsonl'], tmp_path, vocab_size=790)
    found = {first, *map(fingerprint_tokenizer, (grown, lowered, renamed, load_tokenizer(tmp_path)))}
    assert len(found) == 5


def _letters(folder: Path, merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Three letters and their merges as `tokenizer.json`, beside a `tokenizer.model` that is always the same."""
    vocab = {piece: id_ for id_, piece in enumerate(['<s>', '</s>', 'a', 'b', 'c', 'ab', 'bc', 'abc'])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>').save_pretrained(folder)
    (folder / 'tokenizer.model').write_bytes(b'the same in both')
    found = AutoTokenizer.from_pretrained(folder)
    found.vocab_file = str(folder / 'tokenizer.model')  # where transformers' classes for such folders have it
    return found


def test_what_tokenizer_json_says_counts_and_not_the_file_beside_it(tmp_path: Path) -> None:
    one = _letters(tmp_path / '1', [('a', 'b'), ('b', 'c'), ('ab', 'c')])
    same = _letters(tmp_path / '2', [('a', 'b'), ('b', 'c'), ('ab', 'c')])
    other = _letters(tmp_path / '3', [('b', 'c'), ('a', 'b')])
    assert one('abc')['input_ids'] == same('abc')['input_ids'] != other('abc')['input_ids']
    assert fingerprint_tokenizer(one) == fingerprint_tokenizer(same) != fingerprint_tokenizer(other)


def test_what_was_asked_of_it_last_does_not_count() -> None:
    used, fresh = make_tokenizer([]), make_tokenizer([])
    used(['one', 'two and three'], padding=True, truncation=True, max_length=4)
    assert used.backend_tokenizer.padding is not None
    assert fingerprint_tokenizer(used) == fingerprint_tokenizer(fresh)
    used.backend_tokenizer.post_processor = processors.TemplateProcessing(single='$A $A', special_tokens=[])
    assert fingerprint_tokenizer(used) != fingerprint_tokenizer(fresh)


class _Slow:
    """A tokenizer without a Rust backend, whose merges lie in a file of its own."""

    is_fast = False

    def __init__(self, file: Path) -> None:
        self.merges_file, self.special_tokens_map, self.added_tokens_decoder = file, {}, {}
        self.vocab_files_names = {'merges_file': 'merges.txt', 'absent_file': 'absent.txt'}

    def get_vocab(self) -> dict[str, int]:
        return {'a': 0}


def test_of_a_slow_one_the_files_count(tmp_path: Path) -> None:
    (tmp_path / 'merges.txt').write_text('a b')
    found = fingerprint_tokenizer(_Slow(tmp_path / 'merges.txt'))
    assert found == fingerprint_tokenizer(_Slow(tmp_path / 'merges.txt'))
    (tmp_path / 'merges.txt').write_text('b a')
    assert found != fingerprint_tokenizer(_Slow(tmp_path / 'merges.txt'))


def test_the_chat_template_counts_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / 'data.jsonl').write_text('{}')
    config = DatasetConfig(source=str(tmp_path / 'data.jsonl'), cache_dir=str(tmp_path))
    folders: dict[str, set[Path]] = {'from_tokenizer': set(), 'internlm_chat': set()}
    for mark in ('A', 'B'):
        tokenizer = make_tokenizer(['<eoa>'])
        tokenizer.chat_template = '{% for m in messages %}' + mark + '{{ m.content }}<eoa>{% endfor %}'
        for name, found in folders.items():
            found.add(prepared_folder(config, tokenizer=tokenizer, template=get_template(name, tokenizer)))
    assert [len(found) for found in folders.values()] == [2, 1]
