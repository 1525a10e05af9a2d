"""Reads a model folder's `config.json` and `generation_config.json` with validation, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xtuner.errors import ModelError, one_line
from xtuner.model.config_file import make_config
from xtuner.model.hub import read_json
from xtuner.utils.fields import Field, check_fields, shown

_IDS = Field(int | list[int] | None, minimum=-(2**31), maximum=2**31 - 1)
_GENERATION_FIELDS = {'bos_token_id': _IDS, 'eos_token_id': _IDS, 'pad_token_id': _IDS}


def load_config(folder: Path, *, trust_remote_code: bool = False, weights: bool = True) -> Any:
    """Loads the config of a model folder.

    Args:
        folder: Contains `config.json`.
        trust_remote_code: Whether a model unknown to transformers may run its own code.
        weights: Whether the weights will be loaded; False drops the quantization settings.

    Raises:
        ModelError: The config is missing, cannot be read, or describes an unknown model.
    """
    if not (folder / 'config.json').exists():
        raise ModelError(f'{folder} is not a model folder: config.json is missing')
    path = folder / 'config.json'
    content = read_json(path)
    kind = content.get('model_type')
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known and not trust_remote_code:
        what = 'needs code that comes with it; pass --trust-remote-code to run that code' if content.get('auto_map') \
            else 'is unknown to xtuner and to this version of transformers'  # fmt: skip
        raise ModelError(f'{folder}: a model of type {shown(kind)} is not supported natively and {what}')
    if known:
        return make_config(content, path, trust_remote_code=trust_remote_code, weights=weights)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        raise ModelError(f'{path}: {one_line(error)}') from error


def read_generation_settings(folder: Path) -> dict[str, Any]:
    """Reads `generation_config.json`; empty if there is none.

    Only its ids are used: `xtuner.inference.generate` samples by itself and never loads a `custom_generate`.

    Raises:
        ModelError: The file cannot be read, or an id is invalid.
    """
    path = folder / 'generation_config.json'
    if not path.exists():
        return {}
    content = read_json(path)
    check_fields(content, _GENERATION_FIELDS, path, ModelError)
    return content
