"""Whether a folder fits together: its tensors, by name and shape before they are loaded, and its vocabulary."""

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

_LAYER = re.compile(r'[^\d]*\.\d+(?=\.)')  # up to the first number of a name: 'model.layers.0'
_PACKED = 16  # numbers of a model in one of a file, at most: 4-bit weights in 32-bit words, twice for what is shared
_COMPUTED = 2**28  # numbers that are in no file, such as masks


def check_weights(folder: Path, config: Any) -> None:
    """Compares the files' tensors with the model's.

    Args:
        folder: Holds the weights.
        config: The model's config.

    Raises:
        ModelError: a tensor is missing, surplus or of another shape, or a file is torn: the tensor and file are named.
    """
    reader = open_weights(folder)
    if type(config).__module__.startswith('transformers_modules.'):  # code of the model's own, which may run
        return
    model = check_size(reader, config)
    # What transformers renames while it loads cannot be checked before; its own report is checked after loading.
    if not spec_of(config).module_names_on_disk or hasattr(config, 'quantization_config'):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = set(reader.names())
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := [name for name in expected if name not in held and name not in tied]:
        more = f', and {len(missing) - 1} more' if len(missing) > 1 else ''
        files = sorted({reader.file(name).name for name in held})
        raise ModelError(f'{folder}: no file holds tensor {missing[0]!r}{more}; looked in {_some(files)}')
    if surplus := sorted(held - set(expected)):
        more = f', and {len(surplus) - 1} more' if len(surplus) > 1 else ''
        raise ModelError(f'{reader.file(surplus[0])}: tensor {surplus[0]!r} belongs to no part of the model{more}; '
                         'is config.json of the same model?')  # fmt: skip
    for name, shape in expected.items():
        if name in held and reader.shape(name) != shape:
            raise ModelError(f'{reader.file(name)}: tensor {name!r} has shape {reader.shape(name)}, but config.json '
                             f'makes it {shape}')  # fmt: skip


def check_size(reader: WeightReader, config: Any) -> Any:
    """Compares how many layers and numbers a config asks for with what the weights hold, before memory is taken.

    Returns:
        The config's model on torch's meta device.

    Raises:
        ModelError: the config asks for far more than is there, or no model can be built from it.
    """
    path = reader.folder / 'config.json'
    layers = getattr(config.get_text_config(), 'num_hidden_layers', None)
    held = len({match[0] for name in reader.names() if (match := _LAYER.match(name))})
    if isinstance(layers, int) and held and layers > held:
        raise ModelError(f'{path}: `num_hidden_layers` is {layers}, but the weights hold {held} layers')
    model = build_on_meta(config, path)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(reader.shape(name)) for name in reader.names())
    if described > _PACKED * stored + _COMPUTED:
        raise ModelError(f'{path} describes a model of {described:,} numbers, but the weights hold {stored:,}; is it '
                         'of the same model?')  # fmt: skip
    return model


def build_on_meta(config: Any, path: Path, *, trust_remote_code: bool = False) -> Any:
    """The config's model without memory.

    Args:
        config: A transformers config.
        path: Its file, for the message.
        trust_remote_code: Whether a model that transformers does not know may run its own code.

    Raises:
        ModelError: no model can be built from it.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ModelError(f'{path}: a model of type {config.model_type!r} is no causal language model')
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' code, given a stranger's values
        raise ModelError(f'{path}: no model can be built from it: {one_line(error)}') from error


def check_vocabulary(tokenizer: Any, model: Any, folder: Path) -> None:
    """Raises ModelError where the tokenizer gives ids that the model has no embedding for.

    Args:
        tokenizer: Of the same folder.
        model: A transformers model.
        folder: For the message.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(f'{folder}: the tokenizer knows {len(tokenizer)} ids, the model {rows}; the two do not belong '
                         'together, or tokens were added to the tokenizer alone')  # fmt: skip


def _some(files: list[str]) -> str:
    return ', '.join(files if len(files) < 4 else [files[0], '...', files[-1]])
