"""InternLM's tokenizer in Rust, built from the published sentencepiece model.

Ids equal those of the original Python tokenizer: no space is prefixed, runs of spaces are kept, characters outside the
vocabulary are encoded as bytes, BOS is added and EOS is not, `<eoh>` and `<eoa>` are ordinary pieces, and `<s>`, `</s>`
and `<unk>` in a text are special tokens. `decode` returns the original's text as well.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import BatchEncoding, PreTrainedTokenizerFast

from xtuner.errors import ModelError
from xtuner.model.families.internlm.sentencepiece import SPACE, read_model, to_rust

_BYTE = re.compile(r'<0x([0-9A-F]{2})>')
# Where transformers' `clean_up_tokenization` removes the space; the original does so after every decoding.
_CLEAN_UP = (' .', ' ?', ' !', ' ,', " ' ", " n't", " 'm", " 's", " 've", " 're")
_DEFAULTS = {
    'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '</s>',
    'add_bos_token': True, 'add_eos_token': False,
}  # fmt: skip
PREFIX_KEY = 'add_dummy_prefix'
"""In `tokenizer_config.json`, it marks a folder whose `tokenizer.json` was written by this class."""


class InternLMTokenizer(PreTrainedTokenizerFast):
    """Loads a folder with `tokenizer.model`, or one written by `save_pretrained`.

    `save_pretrained` writes a `tokenizer.json` that plain transformers can load, and `tokenizer.model` next to it.
    """

    vocab_files_names = {'vocab_file': 'tokenizer.model', 'tokenizer_file': 'tokenizer.json'}  # noqa: RUF012

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Called by `from_pretrained` with the files and the tokenizer config; returns keyword arguments of `__init__`.

        Raises:
            ModelError: There is no readable `tokenizer.model`.
        """
        if PREFIX_KEY in kwargs and kwargs.get('tokenizer_file'):
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        file = kwargs.get('vocab_file')
        if not file:
            raise ModelError(f'{kwargs.get("name_or_path", "the folder")} has no tokenizer.model')
        proto = read_model(Path(file))
        added: dict[int, AddedToken] = {
            int(i): token for i, token in (kwargs.get('added_tokens_decoder') or {}).items()
        }
        rust = to_rust(proto, {i: str(token) for i, token in added.items() if i < len(proto.pieces)})
        rust.add_tokens([token for _, token in sorted(added.items())])
        for id_, token in added.items():
            if rust.token_to_id(str(token)) != id_:
                raise ModelError(f'{file}: the tokenizer config assigns id {id_} to {str(token)!r}, but the model has '
                                 f'{len(proto.pieces)} pieces: they do not belong together')  # fmt: skip
        kwargs = _DEFAULTS | {key: value for key, value in kwargs.items() if key != 'tokenizer_file'}
        return kwargs | {'tokenizer_object': rust, PREFIX_KEY: bool(proto.normalizer_spec.add_dummy_prefix)}

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Same as in transformers; encodes a plain batch of texts faster, without character offsets.

        As with the original, the result of a plain batch has no offsets; request them with
        `return_offsets_mapping=True`.
        """
        if args or set(kwargs) - {'add_special_tokens'} or not _is_plain_batch(text):
            return super().__call__(text, *args, **kwargs)
        rust = self.backend_tokenizer
        if rust.truncation is not None:  # set by an earlier call
            rust.no_truncation()
        if rust.padding is not None:
            rust.no_padding()
        rust.encode_special_tokens = self.split_special_tokens
        ids = [encoding.ids for encoding in rust.encode_batch_fast(text, **kwargs)]
        if max(map(len, ids)) > self.model_max_length:
            return super().__call__(text, **kwargs)  # which logs a warning
        return BatchEncoding({'input_ids': ids, 'attention_mask': [[1] * len(row) for row in ids]})

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decodes tokens as the original does, with a space before text that precedes a special token."""
        return clean_up(self._join(tokens))

    def _join(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        parts: list[str] = []
        group: list[str] = []
        after_special = False
        for token in tokens:
            if token in special:
                parts += ['' if after_special else ' ', self._pieces_to_text(group), token]
                group = []
            else:
                group.append(token)
            after_special = token in special
        return ''.join([*parts, self._pieces_to_text(group)])

    def _pieces_to_text(self, pieces: list[str]) -> str:
        """Decodes pieces as sentencepiece does: runs of byte pieces are read as UTF-8."""
        if pieces and pieces[0].startswith(SPACE) and self.init_kwargs.get(PREFIX_KEY):
            pieces = [pieces[0][1:], *pieces[1:]]
        parts: list[str] = []
        run = bytearray()
        for piece in pieces:
            match = _BYTE.fullmatch(piece)
            if match:
                run.append(int(match[1], 16))
                continue
            parts += [utf8(bytes(run)), '\0' if piece == '\0\0' else piece.replace(SPACE, ' ')]
            run.clear()
        return ''.join([*parts, utf8(bytes(run))])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Same as the original, which always cleans up; `clean_up_tokenization_spaces=False` keeps every space."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        text = self._join([token for token in tokens if token is not None])
        return text if clean_up_tokenization_spaces is False else clean_up(text)

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        files = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        source = Path(getattr(self, 'vocab_file', None) or '')
        target = Path(save_directory) / 'tokenizer.model'
        if source.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)
            files = (*files, str(target))
        return files

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Saves so that plain transformers can load it: the saved config names transformers' own class."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / 'tokenizer_config.json'
        config = json.loads(path.read_text(encoding='utf-8'))
        config |= {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'add_bos_token': self.add_bos_token,
            'add_eos_token': self.add_eos_token,
            'clean_up_tokenization_spaces': False,  # this class cleans up anyway; plain transformers does not for BPE
        }
        for key in ('auto_map', 'is_local', 'local_files_only'):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
        return files


def _is_plain_batch(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and all(isinstance(item, str) for item in text)


def clean_up(text: str) -> str:
    """Removes the space before punctuation and English contractions, in transformers' order."""
    for pattern in _CLEAN_UP:
        text = text.replace(pattern, pattern.strip())
    return text


def utf8(data: bytes) -> str:
    """Decodes UTF-8; each byte that does not belong to a character becomes U+FFFD, as in sentencepiece."""
    text = ''
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + '\ufffd'
            data = data[error.start + 1 :]
    return text
