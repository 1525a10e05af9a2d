"""What the original Python tokenizers do, on sentencepiece itself: the reference for ours."""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece as spm

SPECIAL = {'<unk>': 0, '<s>': 1, '</s>': 2}
CLEANED = ((' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class OriginalTokenizer:
    """Splits the text at special tokens, encodes what is between with sentencepiece, puts BOS in front."""

    def __init__(self, folder: Path, added: dict[str, int] | None = None) -> None:
        self.sp = spm.SentencePieceProcessor(str(folder / 'tokenizer.model'))
        self.special = SPECIAL | (added or {})
        self._names = {i: name for name, i in self.special.items()}
        self._split = re.compile('(' + '|'.join(map(re.escape, self.special)) + ')')

    def encode(self, text: str) -> list[int]:
        ids = [1]
        for part in self._split.split(text):
            ids += [self.special[part]] if part in self.special else self.sp.encode(part)
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        text, group, after_special = '', [], False
        for i in ids:
            special = i in self._names
            if special and skip_special_tokens:
                continue
            if special:
                text += ('' if after_special else ' ') + self.sp.decode(group) + self._names[i]
                group = []
            else:
                group.append(i)
            after_special = special
        text += self.sp.decode(group)
        for found, kept in CLEANED:
            text = text.replace(found, kept)
        return text
