"""Every causal class that transformers maps: trained and generated with as it is by itself, or refused with the reason.

`REPRESENTATIVE` has each mechanism once; the full sweep is marked slow. `benchmarks/families.py` prints the results as
a table.
"""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.small import small_model
from tests.families.sweep import examine

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Those that cannot be built small, with transformers' exception; at most 15.
UNBUILDABLE = {
    'gemma3n': (ImportError, 'TimmWrapperModel requires the timm library'),
    'gemma4_assistant': (ValueError, 'layer types producing a cache is different'),  # reads another model's keys
    'gemma4_unified_assistant': (ValueError, 'layer types producing a cache is different'),
    'musicgen': (AttributeError, "'MusicgenConfig' object has no attribute 'dropout'"),  # it maps the decoder alone
    'musicgen_melody': (AttributeError, "'MusicgenMelodyConfig' object has no attribute 'dropout'"),
}
_LATER, _POSITIONS = 'a token depends on later ones', 'does not count the positions of a text 0, 1, 2'
# Those that are refused before the first step, with a part of the message.
REFUSED = {
    **dict.fromkeys(
        ('bert', 'bert-generation', 'big_bird', 'cpmant', 'electra', 'ernie', 'megatron-bert', 'prophetnet', 'rembert',
         'roc_bert', 'roformer', 'xlm', 'xlnet'), _LATER),
    **dict.fromkeys(
        ('camembert', 'data2vec-text', 'roberta', 'roberta-prelayernorm', 'xlm-roberta', 'xlm-roberta-xl', 'xmod'),
        _POSITIONS),
    'reformer': 'trains only on rows of exactly',
}  # fmt: skip
OWN_LOGITS = {'gemma3', 'llama4', 'llama4_text', 'mllama', 'modernbert-decoder'}  # whose loss holds all logits at once
# Whose cache is as long as its window, while a forward pass over the whole text ignores the window.
CACHE_DIFFERS = {'moshi'}
NO_GENERATION = {'blt': "'BltConfig' object has no attribute 'num_hidden_layers'"}
REPRESENTATIVE = (
    'bert', 'bloom', 'blt', 'cohere2', 'deepseek_v32', 'falcon_h1', 'gemma2', 'gemma3_text', 'gpt2', 'gpt_neo',
    'gpt_oss', 'granitemoe', 'inkling_text', 'lfm2', 'llama', 'llama4_text', 'mamba2', 'mimo_v2_flash', 'minicpm3',
    'mistral', 'modernbert-decoder', 'musicgen', 'opt', 'phi3', 'prophetnet', 'qwen2', 'qwen3_next', 'reformer',
    'roberta',
)  # fmt: skip
ROUNDING = 1e-4  # relative, float32


@pytest.mark.parametrize('kind', REPRESENTATIVE)
def test_a_representative_class(kind: str) -> None:
    check(kind)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind not in REPRESENTATIVE])
def test_every_other_class(kind: str) -> None:
    check(kind)


def test_the_lists_name_classes_that_there_are() -> None:
    assert {*UNBUILDABLE, *REFUSED, *OWN_LOGITS, *NO_GENERATION, *CACHE_DIFFERS, *REPRESENTATIVE} <= set(KINDS)
    assert len(UNBUILDABLE) <= 15


def check(kind: str) -> None:
    """Right, or refused with the reason that the lists above give; nothing else."""
    if kind in UNBUILDABLE:
        error, message = UNBUILDABLE[kind]
        with pytest.raises(error, match=re.escape(message)):
            small_model(kind)
        return
    result = examine(kind)
    assert REFUSED.get(kind, '') in result.refused and bool(result.refused) is (kind in REFUSED)
    if result.refused:
        return
    assert result.own_logits is (kind in OWN_LOGITS)
    assert result.rows < ROUNDING
    assert (result.pack < ROUNDING) is not bool(
        result.unpacked
    )  # the table leaves out no class, and names none in vain
    assert bool(result.pack_refused) is bool(result.unpacked)  # the trial of the loaded model sees the same
    assert result.generates is (kind not in NO_GENERATION)
    assert result.generates_as_trained is (kind not in {*NO_GENERATION, *CACHE_DIFFERS})
    assert NO_GENERATION.get(kind, '') in result.no_generation
