"""Loads a saved adapter onto its base: completely, or not at all.

peft loads what fits and ignores the rest: if no name matches, the adapter is all zero; half a file gives half an
adapter. Here every tensor of the file must match the model, and vice versa.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xtuner.adapters.attach import Provenance, module_names, read_provenance
from xtuner.adapters.settings import SETTINGS_FILE, adapter_settings, check_patterns, weights_file
from xtuner.errors import CheckpointError, ModelError, one_line
from xtuner.model.run_folder import resolve_checkpoint
from xtuner.model.weights.reader import WeightReader, file_names, open_file

logger = logging.getLogger('xtuner')

# Name parts added by torch.compile, FSDP and activation checkpointing to the modules that they wrap, and the adapter's
# own name, which peft omits from its files and other tools keep.
_WRAPPERS = re.compile(
    r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'
    r'|(?<=\.lora_A\.|\.lora_B\.)(default)\.(?=weight$)'
)
_EMBEDDINGS = ('get_input_embeddings', 'get_output_embeddings')


class AdapterWeights:
    """The tensors of an adapter's file by peft's names, read safely and one at a time.

    Args:
        folder: Contains `adapter_model.safetensors` or `adapter_model.bin`.

    Attributes:
        path: The file.
        keys: Maps peft's names to the names in the file; without the duplicates that peft saves of some tensors.
        reader: Reads tensors by their names in the file.
        wrappers: Name parts in the file that torch.compile, FSDP or peft added.

    Raises:
        CheckpointError: The file is missing, damaged, contains anything but tensors, or is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.path = weights_file(folder)
        try:
            stored = file_names(open_file(self.path))
        except ModelError as error:
            raise CheckpointError(f'{error}; the adapter cannot be used') from error
        if not stored:
            raise CheckpointError(f'{self.path} contains no tensor; the adapter was not saved completely')
        names = {_WRAPPERS.sub('', key): key for key in stored}
        if len(names) < len(stored):
            raise CheckpointError(f'{self.path}: two of its tensors have the same name, {_duplicate(stored)!r}')
        self.wrappers = sorted({match[0].strip('.') for key in stored for match in _WRAPPERS.finditer(key)})
        self.keys = {name: key for name, key in names.items() if not _is_copy(name, names)}
        self.reader = WeightReader(folder, dict.fromkeys(stored, self.path))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by peft's names, on the CPU, memory-mapped if the format allows it."""
        return {name: self.reader.read(key) for name, key in self.keys.items()}

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Yields the shape of each tensor in the file; raises CheckpointError if one cannot be read."""
        try:
            yield from (self.reader.shape(key) for key in self.reader.names())
        except ModelError as error:
            raise CheckpointError(str(error)) from error


def check_adapter(folder: Path, base_fingerprint: str | None) -> Provenance | None:
    """Checks that a folder contains an adapter of this base; returns its provenance.

    Args:
        folder: The result of `resolve_checkpoint`.
        base_fingerprint: `xtuner.model.weights.reader.fingerprint` of the base's weights; None skips the comparison.

    Raises:
        CheckpointError: A file is missing or cannot be read, or the fingerprints differ.
    """
    return _checked(folder, base_fingerprint)[2]


def _checked(folder: Path, base_fingerprint: str | None) -> tuple[AdapterWeights, Any, Provenance | None]:
    """Returns the weights, peft's config and the provenance of an adapter, checked as in `check_adapter`."""
    if not (folder / SETTINGS_FILE).is_file():
        what = f'{SETTINGS_FILE} is missing' if folder.is_dir() else 'no such folder'
        raise CheckpointError(f'{folder}: no adapter found ({what})')
    weights = AdapterWeights(folder)
    config = adapter_settings(folder, weights.shapes())
    provenance = read_provenance(folder)
    if provenance and base_fingerprint and provenance.base_fingerprint != base_fingerprint:
        raise CheckpointError(
            f'{folder} was trained on another base: {provenance.base} with weights {provenance.base_fingerprint[:12]}, '
            f'this base has {base_fingerprint[:12]}; use the base it was trained on'
        )
    return weights, config, provenance


def load_adapter(
    model: nn.Module,
    folder: Path,
    *,
    trainable: bool = False,
    base_fingerprint: str | None = None,
    name: str = 'default',
) -> Any:
    """Loads a saved adapter onto its base.

    Args:
        model: The base model, or a `peft.PeftModel` that already has other adapters. A model on the meta device gets
            the adapter's memory-mapped tensors, and is checked in the same way.
        folder: A checkpoint, an adapter's folder, or a run's work folder.
        trainable: Whether the adapter's parameters require gradients.
        base_fingerprint: The fingerprint of `model`'s weights, to compare with the adapter's; None skips the check.
        name: The adapter's name in peft.

    Returns:
        The `peft.PeftModel`.

    Raises:
        CheckpointError: No adapter found, an adapter of another base, or one with tensors that are missing, unknown to
            this base, or of another shape.
    """
    folder = resolve_checkpoint(folder)
    weights, config, _ = _checked(folder, base_fingerprint)
    if weights.wrappers:
        logger.info('%s: ignoring %s in tensor names, added by torch.compile, FSDP or peft',
                    weights.path, ' and '.join(weights.wrappers))  # fmt: skip
    if 'pissa_niter' in str(getattr(config, 'init_lora_weights', '')):
        logger.warning('%s: %r splits the base by a randomized decomposition that is not saved in the file: '
                       "the loaded model can differ from the trained one; train with 'pissa', which is exact",
                       folder, config.init_lora_weights)  # fmt: skip
    check_patterns(vars(config), module_names(model), str(folder / SETTINGS_FILE))
    config.base_model_name_or_path = getattr(getattr(model, 'config', None), 'name_or_path', None)
    with _one_line_errors(folder, name):
        config.inference_mode = not trainable
        adapted = _with_empty_adapter(model, config, name)
        _check_no_base_tensor(adapted, weights.keys, name, folder)
        _set_tensors(adapted, weights.tensors(), name, folder)
    if not trainable:
        adapted.eval()
    return adapted


def _with_empty_adapter(model: Any, config: Any, name: str) -> Any:
    """Adds an adapter with the config's structure, whose values are set afterwards."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    empty = _is_empty(model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=empty)
        if not config.inference_mode:
            model.set_requires_grad(name)
        return model
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return kind(model, config, adapter_name=name, low_cpu_mem_usage=empty)


def _set_tensors(model: Any, tensors: dict[str, Tensor], name: str, folder: Path) -> None:
    """Sets the adapter's tensors.

    Raises:
        CheckpointError: A tensor does not match the model, or a tensor of the model is missing.
    """
    from peft import set_peft_model_state_dict

    placed: dict[str, Tensor] = {}
    load = model.load_state_dict

    def load_and_record(state: Mapping[str, Tensor], **options: Any) -> Any:
        """Records the names that peft gives the tensors in the model."""
        placed.update(state)
        return load(state, **options)

    model.load_state_dict = load_and_record
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
    finally:
        del model.load_state_dict
    if _is_empty(model):  # peft would move the adapter to the base's (meta) device
        load(placed, strict=False, assign=True)
    if model.peft_config[name].is_prompt_learning:  # its single table of vectors is loaded strictly
        return
    expected = [key for key in model.state_dict() if _belongs(key, model, name)]
    missing = [key for key in result.missing_keys if _belongs(key, model, name)]
    if surplus := list(result.unexpected_keys):
        raise CheckpointError(f'adapter {folder} does not fit this base model: {len(surplus)} of its {len(tensors)} '
                              f'tensors do not match it, such as {surplus[0]!r}; is it the base that it was '
                              'trained on?')  # fmt: skip
    if missing:
        first = missing[0].replace(f'.{name}', '')
        raise CheckpointError(f'adapter {folder} is incomplete: {len(missing)} of the {len(expected)} tensors that its '
                              f'{SETTINGS_FILE} requires are not in its file, such as {first!r}; save it '
                              'again')  # fmt: skip


def _is_empty(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _belongs(key: str, model: Any, name: str) -> bool:
    """Whether a tensor of the model belongs to that adapter, such as `....lora_A.NAME.weight`."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[name].peft_type, '')
    suffix = key.partition(prefix)[2] if prefix else ''
    return name in suffix.split('.')[1:]


def _check_no_base_tensor(model: Any, names: Mapping[str, str], name: str, folder: Path) -> None:
    """Raises CheckpointError if an adapter's file would overwrite a tensor of the base.

    Biases and embeddings are allowed: peft saves those that were trained or resized.
    """
    embeddings = [module for get in _EMBEDDINGS if (module := getattr(model.get_base_model(), get)()) is not None]
    allowed = {id(parameter) for module in embeddings for parameter in module.parameters()}
    for key, parameter in model.named_parameters():
        of_base = not key.endswith('.bias') and id(parameter) not in allowed and not _belongs(key, model, name)
        if key in names and of_base:
            raise CheckpointError(f'adapter {folder} contains {key!r}, a tensor of the base; it is not a plain adapter')


@contextmanager
def _one_line_errors(folder: Path, name: str) -> Iterator[None]:
    """Converts errors of peft, torch and safetensors for an adapter that does not fit into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:  # a fully trained module is not in the file
        raise CheckpointError(f'adapter {folder} is incomplete: {error} is not in its file; save it again') from error
    except Exception as error:  # peft's code with untrusted values
        raise CheckpointError(f'adapter {folder} does not fit this base model: {_reason(error, name)}') from error


def _reason(error: Exception, adapter: str) -> str:
    """The first mismatched tensor in torch's long message, or the message itself."""
    shapes = r'size mismatch for (\S+): .*?shape (.*?) from checkpoint, .*? is (torch.Size\(.*?\))'
    mismatches = re.findall(shapes, str(error))
    if not mismatches:
        return one_line(error)
    name, saved, in_model = (re.sub(r'torch.Size\((.*)\)', r'\1', text) for text in mismatches[0])
    more = f', and {len(mismatches) - 1} more differ' if len(mismatches) > 1 else ''
    return f'{name.replace(f".{adapter}", "")} is {saved} in its file but {in_model} in the model{more}'


def _is_copy(name: str, names: Mapping[str, str]) -> bool:
    """Whether peft saved a tensor a second time, as it does for a fully trained resized embedding."""
    trained = name.replace('.modules_to_save.', '.')
    return '.original_module.' in name or (trained != name and trained in names)


def _duplicate(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for name in names if (key := _WRAPPERS.sub('', name)) in seen or seen.add(key))  # type: ignore[func-returns-value]
