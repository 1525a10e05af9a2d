"""Trains the demo's own small tokenizer, in the published format of InternLM-7B's.

The format: a sentencepiece BPE model without text normalization (identity normalizer, no dummy prefix, no whitespace
removal), with numbers split into digits and byte fallback. The ids are `<unk>` 0, `<s>` 1, `</s>` 2, then 256 bytes,
then the learned pieces, and last the control tokens of a chat, `<eoh>` and `<eoa>`, as user-defined pieces. There is no
padding piece; padding is `</s>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import sentencepiece as spm

CONTROL_PIECES = ('<eoh>', '<eoa>')
ROLE_MARKERS = ('<|System|>:', '<|User|>:', '<|Bot|>:')
MARKER_REPEATS = 500
"""Repetitions of the role markers in the training text; every turn has them, so each should become few pieces."""

TOKENIZER_CONFIG = {
    'add_bos_token': True,
    'add_eos_token': False,
    'bos_token': '<s>',
    'clean_up_tokenization_spaces': False,
    'eos_token': '</s>',
    'model_max_length': 1000000000000000019884624838656,  # the published value, meaning no limit
    'pad_token': '</s>',
    'tokenizer_class': 'InternLMTokenizer',
    'unk_token': '<unk>',
}
SPECIAL_TOKENS_MAP = {name: TOKENIZER_CONFIG[name] for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token')}


def train_tokenizer(files: Sequence[str | Path], out_folder: str | Path, vocab_size: int = 2000) -> Path:
    """Trains on the texts of conversation files and writes a tokenizer folder; the same input gives the same bytes.

    Args:
        files: JSON-lines files of `{"messages": [{"role": ..., "content": ...}]}`.
        out_folder: Gets `tokenizer.model`, `tokenizer_config.json` and `special_tokens_map.json`; created if missing.
        vocab_size: Number of pieces, including bytes and control tokens.

    Returns:
        `out_folder`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not a conversation (file and line are named).
        RuntimeError: the text is too short for `vocab_size` pieces.
    """
    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.model').write_bytes(_train_model(_texts(files), vocab_size))
    _write_json(folder / 'tokenizer_config.json', TOKENIZER_CONFIG)
    _write_json(folder / 'special_tokens_map.json', SPECIAL_TOKENS_MAP)
    return folder


def _train_model(texts: Iterator[str], vocab_size: int) -> bytes:
    """The serialized sentencepiece model; one thread and no file names, so that it is reproducible."""
    trained = BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=trained,
        model_type='bpe',
        vocab_size=vocab_size - len(CONTROL_PIECES),
        character_coverage=0.9995,
        num_threads=1,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = trained.getvalue() + b''.join(map(_user_defined_piece, CONTROL_PIECES)) + _vocab_size_field(vocab_size)
    # Parsing it merges the appended fields into one message.
    return spm.SentencePieceProcessor(model_proto=model).serialized_model_proto()


def _user_defined_piece(piece: str) -> bytes:
    """One more entry of the model's list of pieces, in protobuf's wire format.

    With its own option, sentencepiece would put user-defined pieces before the bytes; the published model has them
    after the learned pieces. A protobuf message may be extended by appending fields, so the entry is appended.
    """
    text = piece.encode()
    body = b'\x0a' + bytes([len(text)]) + text  # field 1: the piece
    body += b'\x15\x00\x00\x00\x00'  # field 2: the score, a float, 0
    body += b'\x18\x04'  # field 3: the type, 4 is USER_DEFINED
    return b'\x0a' + bytes([len(body)]) + body


def _vocab_size_field(vocab_size: int) -> bytes:
    """The vocabulary size in the trainer spec (field 4 of field 2), corrected for the appended pieces."""
    body = b'\x20' + _varint(vocab_size)
    return b'\x12' + bytes([len(body)]) + body


def _varint(value: int) -> bytes:
    """Encodes an integer as a protobuf varint: seven bits per byte, lowest first, top bit set except in the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _texts(files: Sequence[str | Path]) -> Iterator[str]:
    """Every line of every message, then the role markers."""
    for file in files:
        with open(file, encoding='utf-8') as lines:
            for number, line in enumerate(lines, start=1):
                yield from _message_lines(line, f'{file}:{number}')
    for _ in range(MARKER_REPEATS):
        yield from ROLE_MARKERS


def _message_lines(line: str, origin: str) -> list[str]:
    try:
        contents = [message['content'] for message in json.loads(line)['messages']]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{origin}: expected {{"messages": [{{"role": ..., "content": ...}}]}}, got {line[:80]!r}'
        ) from error
    return [part for content in contents for part in content.splitlines()]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
