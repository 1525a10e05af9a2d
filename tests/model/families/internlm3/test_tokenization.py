"""InternLM3's tokenizer against what the original does on sentencepiece, for each of its settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.published import pieces, write_tokenizer
from xtuner.errors import ModelError
from xtuner.model.families.internlm3.tokenization import SPACES_KEY, InternLM3Tokenizer
from xtuner.model.loading import load_tokenizer

PARTS = [
    'Hello',
    ' the cat',
    '  ',
    '\n',
    '<|im_start|>',
    '<|im_end|>',
    '</s>',
    '<s>',
    'user',
    '語',
    ' ,',
    '\0',
    '▁',
    '',
]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=8)), max_size=8).map(''.join)


class Original:
    """Splits at special tokens, encodes between them, and joins again, as the published Python tokenizer."""

    def __init__(self, folder: Path, *, prefixed: bool, spaced: bool) -> None:
        self.sp = spm.SentencePieceProcessor(str(folder / 'tokenizer.model'))
        size = len(self.sp)
        self.special = {'<unk>': 0, '<s>': 1, '</s>': 2, '<|im_start|>': size, '<|im_end|>': size + 1}
        self.names = {i: name for name, i in self.special.items()}
        self.prefixed, self.spaced = prefixed, spaced
        self._split = re.compile('(' + '|'.join(map(re.escape, self.special)) + ')')

    def encode(self, text: str) -> list[int]:
        ids = [1]
        for part in self._split.split(text):
            ids += [self.special[part]] if part in self.special else self.sp.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        tokens = [self.names.get(i) or self.sp.id_to_piece(i) for i in ids]
        if tokens and self.prefixed and tokens[0].startswith('▁'):
            tokens[0] = tokens[0][1:]
        text, group, before = '', [], False
        for place, token in enumerate(tokens):
            if token in self.special:
                if not before and place and self.spaced:
                    text += ' '
                text += self.sp.decode(group) + token
                before, group = True, []
            else:
                if before and place == 1 and self.prefixed and not token.startswith('▁') and self.spaced:
                    text += ' '
                group.append(token)
                before = False
        return text + self.sp.decode(group)


CASES = [(dummy, prefixed, spaced) for dummy in (False, True) for prefixed in (False, True) for spaced in (False, True)]


@pytest.fixture(scope='module', params=CASES, ids=str)
def both(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[InternLM3Tokenizer, Original]:
    dummy, prefixed, spaced = request.param
    folder = write_tokenizer(tmp_path_factory.mktemp('tokenizer'), 'InternLM3', dummy_prefix=dummy)
    file = folder / 'tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'add_prefix_space': prefixed, SPACES_KEY: spaced}))
    ours = load_tokenizer(folder)
    assert type(ours) is InternLM3Tokenizer
    return ours, Original(folder, prefixed=prefixed, spaced=spaced)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(text=texts)
def test_ids_and_texts(both: tuple[InternLM3Tokenizer, Original], text: str) -> None:
    ours, original = both
    ids = original.encode(text)
    assert ours(text).input_ids == ids
    assert ours.decode(ids) == original.decode(ids)
    assert ours.decode(ids[1:]) == original.decode(ids[1:])


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / 'published', 'InternLM3')
    ours = load_tokenizer(folder)
    ours.save_pretrained(tmp_path / 'saved')
    again = load_tokenizer(tmp_path / 'saved')
    assert type(again) is InternLM3Tokenizer
    text = '<|im_start|>user\nthe cat , sat<|im_end|>\n'
    assert again(text).input_ids == ours(text).input_ids
    assert again.decode(again(text).input_ids) == ours.decode(ours(text).input_ids) == '<s>' + text
    assert again.decode(again(text).input_ids, clean_up_tokenization_spaces=True) == '<s>' + text.replace(' ,', ',')


def test_names_that_do_not_fit_the_pieces_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, 'InternLM3')
    file = folder / 'tokenizer_config.json'
    content = json.loads(file.read_text())
    far = str(len(pieces(folder)) + 50)
    content['added_tokens_decoder'][far] = content['added_tokens_decoder'].pop(str(len(pieces(folder))))
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r'id \d+ to .*, but the model has 320 pieces'):
        load_tokenizer(folder)
