"""Models that do not keep the samples of a pack apart: a table of model types, and lengths named in a config.

Packed training relies on position ids that start again with each sample: transformers builds a block-diagonal attention
mask from them. Models without such a mask (ALiBi, positions counted by the cache) and models with a recurrent state or
a convolution let a sample read the ones before it. Others mix samples only beyond a length: chunks of attention are
counted from the start of the row, and some rotary angles depend on the longest sample of the row.

`tests/families` measures each of transformers' causal classes and compares it with this table; what the table does not
know is found by a trial on the loaded model (`xtuner.objectives.model_checks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.model.families.find import spec_of

# Types of text models in which a sample depends on the earlier samples of its pack, whatever their length.
MIXING_TYPES = frozenset((
    'afmoe', 'bailing_hybrid', 'bamba', 'bart', 'bigbird_pegasus', 'biogpt', 'blenderbot', 'blenderbot-small', 'bloom',
    'blt', 'deepseek_v4', 'falcon', 'falcon_h1', 'falcon_mamba', 'gpt_oss', 'granitemoehybrid', 'inkling2_text',
    'inkling_text', 'jamba', 'kimi_linear', 'lfm2', 'lfm2_moe', 'lfm3', 'mamba', 'mamba2', 'marian', 'mbart', 'minimax',
    'mpt', 'mvp', 'nemotron_h', 'olmo_hybrid', 'openai-gpt', 'opt', 'pegasus', 'plbart', 'qwen3_5_moe_text',
    'qwen3_5_text', 'qwen3_next', 'qwen4_exp_text', 'recurrent_gemma', 'rwkv', 'trocr', 'xglm', 'xlstm', 'zamba',
    'zamba2', 'zaya',
))  # fmt: skip
# Rotary forms whose angles change for the whole batch once one sample is longer than a length, and the field with it.
_LENGTH_DEPENDENT_ROPE = {'longrope': 'original_max_position_embeddings', 'dynamic': 'max_position_embeddings'}


def packing_unsupported_reason(config: Any, max_length: int) -> str | None:
    """Why samples of a pack would not be trained as they are alone, as a clause; None where they would, so far known.

    Args:
        config: A transformers config; of a composite one, its text model counts.
        max_length: Most tokens of a pack.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type in MIXING_TYPES or spec_of(text).isolates_packs is False:
        return f'in a model of type {text.model_type!r} the samples of a pack see each other'
    chunk = getattr(text, 'attention_chunk_size', None)
    if chunk and max_length > chunk:
        return (
            f'`attention_chunk_size` is {chunk} and counted from the start of a pack, so that samples of a pack longer '
            f'than that are cut elsewhere than alone (dataset.max_length={chunk} would keep packing)'
        )
    original = rope_trained_length(text)
    if original and max_length > original:
        return (
            f'one sample of more than {original} tokens changes the rotary angles of all samples of its pack '
            f'(dataset.max_length={original} would keep packing)'
        )
    return None


def rope_trained_length(config: Any) -> int | None:
    """Tokens beyond which rotary angles depend on the longest sample of a batch; None where they never do.

    Args:
        config: A transformers config; of a composite one, its text model counts.
    """
    text = config.get_text_config(decoder=True)
    lengths = []
    for rope in _ropes(text):
        field = _LENGTH_DEPENDENT_ROPE.get(rope.get('rope_type', rope.get('type')), '')
        lengths.append(field and (rope.get(field) or getattr(text, field, None)))
    return min((int(length) for length in lengths if length), default=None)


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """Each set of rotary parameters of a config: one for all layers, or one for each kind of layer."""
    for name in ('rope_parameters', 'rope_scaling', 'rotary'):
        found = getattr(text, name, None)
        if isinstance(found, Mapping):
            yield from (found, *(value for value in found.values() if isinstance(value, Mapping)))
