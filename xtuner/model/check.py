"""Checks a model folder: tensors by name and shape before they are loaded, and the vocabulary size."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xtuner.errors import ModelError, one_line
from xtuner.model.families.find import spec_of
from xtuner.model.weights.reader import WeightReader, open_weights

_LAYER = re.compile(r'[^\d]*\.\d+(?=\.)')  # a name up to its first number: 'model.layers.0'
_PACKED = 16  # maximum parameters per stored element: 4-bit weights in 32-bit words, doubled for tied weights
_COMPUTED = 2**28  # parameters and buffers that are not stored, such as masks


def check_weights(folder: Path, config: Any) -> None:
    """Compares the stored tensors with the model's.

    Args:
        folder: Contains the weights.
        config: The model's config.

    Raises:
        ModelError: A tensor is missing, unexpected or has another shape, or a file is damaged; the tensor and file are
            named.
    """
    reader = open_weights(folder)
    if type(config).__module__.startswith('transformers_modules.'):  # the model's own code, which was allowed to run
        return
    model = check_size(reader, config)
    # Renaming by transformers during loading cannot be checked in advance; its own report is checked after loading.
    composite = config.get_text_config(decoder=True) is not config  # a spec describes the language model in it alone
    if composite or not spec_of(config).module_names_on_disk or hasattr(config, 'quantization_config'):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = set(reader.names())
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := [name for name in expected if name not in held and name not in tied]:
        more = f', and {len(missing) - 1} more' if len(missing) > 1 else ''
        files = sorted({reader.file(name).name for name in held})
        raise ModelError(f'{folder}: no file contains tensor {missing[0]!r}{more}; searched {_file_list(files)}')
    if surplus := sorted(held - set(expected)):
        more = f', and {len(surplus) - 1} more' if len(surplus) > 1 else ''
        raise ModelError(f'{reader.file(surplus[0])}: tensor {surplus[0]!r} is not part of the model{more}; '
                         'does config.json belong to this model?')  # fmt: skip
    for name, shape in expected.items():
        if name in held and reader.shape(name) != shape:
            raise ModelError(f'{reader.file(name)}: tensor {name!r} has shape {reader.shape(name)}, but config.json '
                             f'requires {shape}')  # fmt: skip


def check_size(reader: WeightReader, config: Any) -> Any:
    """Compares a config's number of layers and parameters with the stored weights, before memory is allocated.

    Returns:
        The config's model on the meta device.

    Raises:
        ModelError: The config describes far more than is stored, or no model can be built from it.
    """
    path = reader.folder / 'config.json'
    layers = getattr(config.get_text_config(), 'num_hidden_layers', None)
    held = len({match[0] for name in reader.names() if (match := _LAYER.match(name))})
    if isinstance(layers, int) and held and layers > held:
        raise ModelError(f'{path}: `num_hidden_layers` is {layers}, but the weights contain {held} layers')
    model = build_on_meta(config, path)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(reader.shape(name)) for name in reader.names())
    if described > _PACKED * stored + _COMPUTED:
        raise ModelError(f'{path} describes a model of {described:,} parameters, but the weights contain {stored:,}; '
                         'does it belong to this model?')  # fmt: skip
    return model


def build_on_meta(config: Any, path: Path, *, trust_remote_code: bool = False) -> Any:
    """Builds the config's model on the meta device.

    Args:
        config: A transformers config.
        path: The config file, for error messages.
        trust_remote_code: Whether a model unknown to transformers may run its own code.

    Raises:
        ModelError: No model can be built from the config.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ModelError(f'{path}: a model of type {config.model_type!r} is not a causal language model')
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' code with untrusted values
        raise ModelError(f'{path}: no model can be built from it: {one_line(error)}') from error


def check_vocabulary(tokenizer: Any, model: Any, folder: Path) -> None:
    """Raises ModelError if the tokenizer produces ids without an embedding in the model.

    Args:
        tokenizer: The tokenizer of the same folder.
        model: A transformers model.
        folder: The folder, for error messages.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(f'{folder}: the tokenizer has {len(tokenizer)} ids but the model {rows} embeddings; they do '
                         'not belong together, or tokens were added only to the tokenizer')  # fmt: skip


def _file_list(files: list[str]) -> str:
    return ', '.join(files if len(files) < 4 else [files[0], '...', files[-1]])
