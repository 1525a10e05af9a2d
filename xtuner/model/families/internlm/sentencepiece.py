"""Converts a published sentencepiece model to a Rust tokenizer with identical ids.

sentencepiece merges, of all adjacent pairs that form a piece, the one whose piece has the best score, and among equal
scores the leftmost. The Rust BPE ranks pairs by their position in a list. InternLM's vocabulary joins those of several
languages, so that different pieces share a score, and a piece may be formed by more than one pair. The list below
therefore puts a pair before those that may begin where it ends, so that the better rank is also the leftmost pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from xtuner.errors import ModelError

SPACE = '▁'
_BPE = 2  # sentencepiece's model type, and its types of pieces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
Pair = tuple[str, str]


def read_model(path: Path) -> Any:
    """Reads a `tokenizer.model`.

    Returns:
        sentencepiece's `ModelProto`.

    Raises:
        ModelError: The file is missing, is not a sentencepiece model, or is a different type than InternLM's.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto: Any = pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f'{path} cannot be read: {error.strerror or error}') from error
    except DecodeError as error:
        raise ModelError(f'{path} is not a sentencepiece model, or is truncated') from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _BPE or not trainer.byte_fallback or not proto.pieces:
        raise ModelError(f'{path} is not a sentencepiece BPE model with byte fallback, as required for InternLM')
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        raise ModelError(f'{path} normalizes the text before splitting it (normalizer {normalizer.name!r}), '
                         'which InternLM tokenizers do not do')  # fmt: skip
    return proto


def to_rust(proto: Any, renamed: dict[int, str] | None = None) -> Tokenizer:
    """Builds the Rust tokenizer, with the same ids as sentencepiece for every text.

    Args:
        proto: From `read_model`.
        renamed: Tokens that replace pieces, by id, as named by `added_tokens_decoder` in a tokenizer config.

    Returns:
        A tokenizer that adds no special tokens. `<s>`, `</s>` and `<unk>` are special tokens, user-defined pieces are
        matched literally in the text, and everything else is merged.
    """
    pieces = list(proto.pieces)
    names = [(renamed or {}).get(i, piece.piece) for i, piece in enumerate(pieces)]
    nul = next((i for i, piece in enumerate(pieces) if piece.piece == '\0'), None)
    if nul is not None:
        names[nul] = '\0\0'  # sentencepiece never uses this piece and encodes NUL as a byte
    ids = {name: i for i, name in enumerate(names)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL and piece.piece != '\0'}
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    rust = Tokenizer(BPE(ids, list(merges(scores, ids)), unk_token=unknown, byte_fallback=True, fuse_unk=False))
    escape = normalizers.Replace(' ', SPACE)
    prefix = proto.normalizer_spec.add_dummy_prefix
    rust.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    decode = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*decode, decoders.Strip(' ', 1, 0)] if prefix else decode)
    special = [p.piece for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    defined = [names[i] for i, p in enumerate(pieces) if p.type == _USER_DEFINED and i not in (renamed or {})]
    rust.add_tokens([AddedToken(name, special=False, normalized=False) for name in defined])
    return rust


def merges(scores: dict[str, float], ids: dict[str, int]) -> Iterator[Pair]:
    """Yields all pairs of pieces that form a piece, in sentencepiece's merge order.

    Args:
        scores: Score of each piece that may take part in merges.
        ids: Their ids, used as tie-breaker.
    """
    groups: dict[float, list[Pair]] = defaultdict(list)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                groups[score].append((left, right))
    for score in sorted(groups, reverse=True):
        yield from _leftmost_first(sorted(groups[score], key=lambda pair: (ids[pair[0]], ids[pair[1]])))


def _leftmost_first(pairs: list[Pair]) -> list[Pair]:
    """Orders pairs so that (x, y) comes before (y, z): a depth-first topological sort.

    Runs of one character form cycles, such as (-, --) and (--, -), which are broken where the search meets them.
    Merging starts at the left of a run, so that the smaller piece ends up at its right end and the cycle does not
    matter.
    """
    if len(pairs) == 1:
        return pairs
    beginning: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        beginning[pair[0]].append(pair)
    done: list[Pair] = []
    seen: set[Pair] = set()
    for start in reversed(pairs):
        if start in seen:
            continue
        seen.add(start)
        path = [(start, iter(beginning.get(start[1], ())))]
        while path:
            pair, following = path[-1]
            unseen = next((other for other in following if other not in seen), None)
            if unseen is None:
                done.append(pair)
                path.pop()
            else:
                seen.add(unseen)
                path.append((unseen, iter(beginning.get(unseen[1], ()))))
    return done[::-1]
