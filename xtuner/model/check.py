"""Whether a folder fits together: its tensors, by name and shape before they are loaded, and its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xtuner.errors import ModelError
from xtuner.model.weights import open_weights

# Families whose published tensors have the names of their modules. What transformers renames while it loads cannot
# be checked before; its own report is checked after loading.
_NAMED_ALIKE = ('internlm', 'internlm2', 'internlm3', 'llama')


def check_weights(folder: Path, config: Any) -> None:
    """Compares the files' tensors with the model's.

    Args:
        folder: Holds the weights.
        config: The model's config.

    Raises:
        ModelError: a tensor is missing, surplus or of another shape, or a file is torn: the tensor and file are named.
    """
    reader = open_weights(folder)
    if config.model_type not in _NAMED_ALIKE or hasattr(config, 'quantization_config'):
        return
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
