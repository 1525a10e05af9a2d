"""Small tokenizers whose ids can be looked at, and data prepared with one.

They are byte-level or, like Llama's, put a space before each text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.templates.builtin import TEMPLATES, get_template

if TYPE_CHECKING:  # unit tests share this file, and import no transformers
    from transformers import PreTrainedTokenizerFast

_TEXTS = ['Hello there, how are you today?', 'I am fine, thank you. And you?', '<|User|>:What is 2+2?\n<|Bot|>:4\n',
          'USER: hi ASSISTANT: hello', '### Instruction:\n### Response:\n', 'the quick fox', '你好'] * 4  # fmt: skip


RECORDS = [{'question': 'Hi ' * (n % 7 + 1), 'answer': f'I am {n}. ' * (n % 5 + 1)} for n in range(60)]


def all_markers() -> list[str]:
    """Every control token of every template."""
    names = (marker for t in TEMPLATES.module_dict.values() for marker in (*t.markers, *t.stop))
    return list(dict.fromkeys(names))


def make_tokenizer(markers: list[str], *, bos: str | None = '<s>', eos: str = '</s>') -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 500 tokens whose control tokens are `markers`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ['<unk>', *filter(None, (bos, eos)), *markers]
    trainer = trainers.BpeTrainer(vocab_size=300 + len(special), special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(_TEXTS, trainer)
    return _fast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)


def make_spaced_tokenizer(markers: list[str], *, scheme: str = 'first') -> PreTrainedTokenizerFast:
    """A character BPE with byte fallback that, like Llama's, writes spaces as '▁' and puts one before a text."""
    chars = sorted({char for text in _TEXTS for char in text.replace(' ', '▁')} - {'\n'})
    bytes_ = [f'<0x{i:02X}>' for i in range(256)]
    merges = [('▁', char) for char in chars if char != '▁'] + [('▁H', 'e'), ('l', 'l')]
    pieces = ['<unk>', '<s>', '</s>', *bytes_, *chars, *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    if scheme == 'normalizer':
        backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ('<unk>', '<s>', '</s>', *markers)])
    return _fast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def _fast(**options: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(**options)


@pytest.fixture(scope='session')
def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the control tokens of every template; pad is eos."""
    return make_tokenizer(all_markers())


@pytest.fixture(scope='session')
def internlm_like() -> PreTrainedTokenizerFast:
    """Like InternLM's: `<eoh>` and `<eoa>` are tokens, `<|User|>` is text."""
    return make_tokenizer(['<eoh>', '<eoa>'])


@pytest.fixture
def prepare(tmp_path, internlm_like, capsys):
    """Prepares records, in a fresh cache, and returns the data set; `prepare.folder` is where the files are."""
    from xtuner.dataset.prepare import prepare_dataset

    template = get_template('internlm_chat', internlm_like)

    def run(records=RECORDS, *, part='train', **options):
        if records is not None:
            lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in records]
            (tmp_path / 'data.jsonl').write_bytes(b'\n'.join(lines))
            options.setdefault('source', str(tmp_path / 'data.jsonl'))
        options.setdefault('cache_dir', str(tmp_path / 'cache'))
        run.config = DatasetConfig(**{'max_length': 128, **options})
        return prepare_dataset(run.config, tokenizer=internlm_like, template=template, part=part)

    run.folder, run.template, run.tokenizer = tmp_path, template, internlm_like
    return run
