"""InternLM v1's tokenizer, Rust-backed, built from the published sentencepiece model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from xtuner.errors import ModelError

_USER_DEFINED = 4  # sentencepiece's piece type


def build_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a sentencepiece BPE model in InternLM's form: no dummy prefix, byte fallback.

    Raises:
        ModelError: the file is no sentencepiece model.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto = pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise ModelError(f'{path} is no sentencepiece model: {error}') from error
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    backend = Tokenizer(BPE(ids, _merges(ids, [p.score for p in proto.pieces]), unk_token='<unk>', byte_fallback=True))
    backend.normalizer = normalizers.Replace(Regex(' '), '▁')
    backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing('<s> $A', '<s> $A <s> $B', [('<s>', ids['<s>'])])
    defined = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in defined])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>'
    )


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best-scored piece first: the order in which sentencepiece merges."""
    found = []
    for piece, index in ids.items():
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
        found += [(-scores[index], left, right, a, b) for left, right, a, b in sorted(pairs)]
    return [(a, b) for *_, a, b in sorted(found, key=lambda f: f[0])]
