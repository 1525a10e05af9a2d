"""A config that transformers writes is read as transformers reads it, for every causal language model that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xtuner.errors import ModelError
from xtuner.model.loading import load_config

_NOT_BUILT = {'gemma4_assistant'}  # its config cannot be built without arguments
_TWO_TEXT_MODELS = {'musicgen', 'musicgen_melody'}  # text to music: an encoder and a decoder, neither is the model
_LEFT_OUT = {'dots3_note': 'vision_config'}  # holds `per_layer_config`, which is dropped; no part of the text model


@pytest.mark.parametrize('kind', [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in _NOT_BUILT])
def test_a_default_config_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    if kind in _TWO_TEXT_MODELS:
        with pytest.raises(ModelError, match='Multiple valid text configs'):
            load_config(tmp_path)
        return
    ours, theirs = load_config(tmp_path).to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    for content in (ours, theirs):
        content.pop(_LEFT_OUT.get(kind), None)
    assert ours == theirs
