"""Loading a saved adapter: whole, on the base it belongs to, or not at all.

peft loads what fits and passes over the rest: a file whose names match nothing leaves an adapter of zeros, half a file
leaves half of one. Here every tensor of the file must have its place, and every place its tensor.
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

# What torch.compile, FSDP and activation checkpointing put into the names of the modules they wrap, and the adapter's
# own name, which peft leaves out of a file and other tools keep.
_WRAPPERS = re.compile(
    r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'
    r'|(?<=\.lora_A\.|\.lora_B\.)(default)\.(?=weight$)'
)
_EMBEDDINGS = ('get_input_embeddings', 'get_output_embeddings')


class AdapterWeights:
    """The tensors of an adapter's file by peft's names, read safely and one at a time.

    Args:
        folder: Holds `adapter_model.safetensors` or `adapter_model.bin`.

    Attributes:
        path: The file.
        keys: For each of peft's names the name in the file; copies that peft saves of some are left out.
        reader: Reads them by their names in the file.
        wrappers: What torch.compile, FSDP or peft put into the names in the file.

    Raises:
        CheckpointError: no such file, a damaged one, one that holds anything but tensors, or none at all.
    """

    def __init__(self, folder: Path) -> None:
        self.path = weights_file(folder)
        try:
            stored = file_names(open_file(self.path))
        except ModelError as error:
            raise CheckpointError(f'{error}; the adapter cannot be used') from error
        if not stored:
            raise CheckpointError(f'{self.path} holds no tensor; the adapter was not saved whole, save it again')
        names = {_WRAPPERS.sub('', key): key for key in stored}
        if len(names) < len(stored):
            raise CheckpointError(f'{self.path}: two of its tensors have one name, {_twice(stored)!r}')
        self.wrappers = sorted({match[0].strip('.') for key in stored for match in _WRAPPERS.finditer(key)})
        self.keys = {name: key for name, key in names.items() if not _is_copy(name, names)}
        self.reader = WeightReader(folder, dict.fromkeys(stored, self.path))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by peft's names, on the CPU, memory-mapped where the file allows it."""
        return {name: self.reader.read(key) for name, key in self.keys.items()}

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Yields the shape of each tensor in the file; raises CheckpointError where one cannot be read."""
        try:
            yield from (self.reader.shape(key) for key in self.reader.names())
        except ModelError as error:
            raise CheckpointError(str(error)) from error


def check_adapter(folder: Path, base_fingerprint: str | None) -> Provenance | None:
    """Checks that a folder holds an adapter, and one of this base; returns its provenance.

    Args:
        folder: As `resolve_checkpoint` gives it.
        base_fingerprint: `xtuner.model.weights.reader.fingerprint` of the base's weights; None skips that comparison.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the fingerprints differ.
    """
    return _checked(folder, base_fingerprint)[2]


def _checked(folder: Path, base_fingerprint: str | None) -> tuple[AdapterWeights, Any, Provenance | None]:
    """The weights, peft's config and the provenance of an adapter, checked as `check_adapter` says."""
    if not (folder / SETTINGS_FILE).is_file():
        what = f'{SETTINGS_FILE} is missing' if folder.is_dir() else 'no such folder'
        raise CheckpointError(f'{folder}: no adapter there ({what})')
    weights = AdapterWeights(folder)
    config = adapter_settings(folder, weights.shapes())
    provenance = read_provenance(folder)
    if provenance and base_fingerprint and provenance.base_fingerprint != base_fingerprint:
        raise CheckpointError(
            f'{folder} was trained on another base: {provenance.base} with weights {provenance.base_fingerprint[:12]}, '
            f'these are {base_fingerprint[:12]}; give the base it was trained on'
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
    """Puts a saved adapter on its base.

    Args:
        model: The base model, or a `peft.PeftModel` that holds other adapters already. One without memory (on the
            meta device) takes the adapter's tensors as they are mapped, and is checked like any other.
        folder: A checkpoint, an adapter's folder, or a run's work folder.
        trainable: Whether its parameters shall require gradients.
        base_fingerprint: The fingerprint of `model`'s weights, to compare with the adapter's; None skips that.
        name: What peft calls it.

    Returns:
        The `peft.PeftModel`.

    Raises:
        CheckpointError: no adapter there, an adapter of another base, or one of which a tensor is missing, has no
            place in this base, or another shape.
    """
    folder = resolve_checkpoint(folder)
    weights, config, _ = _checked(folder, base_fingerprint)
    if weights.wrappers:
        logger.info('%s: %s, which torch.compile, FSDP or peft put into the names of its tensors, is left out',
                    weights.path, ' and '.join(weights.wrappers))  # fmt: skip
    if 'pissa_niter' in str(getattr(config, 'init_lora_weights', '')):
        logger.warning('%s: %r splits the base by a randomised decomposition, and the file does not hold that split: '
                       "the loaded model can differ from the trained one; train with 'pissa', which is exact",
                       folder, config.init_lora_weights)  # fmt: skip
    check_patterns(vars(config), module_names(model), str(folder / SETTINGS_FILE))
    config.base_model_name_or_path = getattr(getattr(model, 'config', None), 'name_or_path', None)
    with _explained(folder, name):
        config.inference_mode = not trainable
        adapted = _with_empty_adapter(model, config, name)
        _check_own_tensors(adapted, weights.keys, name, folder)
        _put(adapted, weights.tensors(), name, folder)
    if not trainable:
        adapted.eval()
    return adapted


def _with_empty_adapter(model: Any, config: Any, name: str) -> Any:
    """The model with an adapter of the config's form, whose values are still to come."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    empty = _is_empty(model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=empty)
        if not config.inference_mode:
            model.set_requires_grad(name)
        return model
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return kind(model, config, adapter_name=name, low_cpu_mem_usage=empty)


def _put(model: Any, tensors: dict[str, Tensor], name: str, folder: Path) -> None:
    """Gives the adapter its values.

    Raises:
        CheckpointError: a tensor has no place, or a place no tensor.
    """
    from peft import set_peft_model_state_dict

    placed: dict[str, Tensor] = {}
    load = model.load_state_dict

    def load_and_note(state: Mapping[str, Tensor], **options: Any) -> Any:
        """Notes the names that peft gives the tensors in the model."""
        placed.update(state)
        return load(state, **options)

    model.load_state_dict = load_and_note
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
    finally:
        del model.load_state_dict
    if _is_empty(model):  # peft would move the adapter to where its base is, which is nowhere
        load(placed, strict=False, assign=True)
    if model.peft_config[name].is_prompt_learning:  # its one table of vectors is loaded strictly
        return
    places = [key for key in model.state_dict() if _belongs(key, model, name)]
    missing = [key for key in result.missing_keys if _belongs(key, model, name)]
    if surplus := list(result.unexpected_keys):
        raise CheckpointError(f'adapter {folder} does not fit this base model: {len(surplus)} of its {len(tensors)} '
                              f'tensors have no place in it, such as {surplus[0]!r}; is it the base that it was '
                              'trained on?')  # fmt: skip
    if missing:
        first = missing[0].replace(f'.{name}', '')
        raise CheckpointError(f'adapter {folder} is not whole: {len(missing)} of the {len(places)} tensors that its '
                              f'{SETTINGS_FILE} asks for are not in its file, such as {first!r}; save it '
                              'again')  # fmt: skip


def _is_empty(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _belongs(key: str, model: Any, name: str) -> bool:
    """Whether a tensor of the model is one of that adapter, such as `....lora_A.NAME.weight`."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[name].peft_type, '')
    found = key.partition(prefix)[2] if prefix else ''
    return name in found.split('.')[1:]


def _check_own_tensors(model: Any, names: Mapping[str, str], name: str, folder: Path) -> None:
    """Raises CheckpointError where an adapter's file would write over a tensor of the base.

    Biases and embeddings are no such case: peft saves those where they were trained or resized.
    """
    embeddings = [module for get in _EMBEDDINGS if (module := getattr(model.get_base_model(), get)()) is not None]
    allowed = {id(parameter) for module in embeddings for parameter in module.parameters()}
    for key, parameter in model.named_parameters():
        own = not key.endswith('.bias') and id(parameter) not in allowed and not _belongs(key, model, name)
        if key in names and own:
            raise CheckpointError(f'adapter {folder} holds {key!r}, a tensor of the base; it is no plain adapter')


@contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    """Turns what peft, torch and safetensors raise on an adapter that does not fit into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:  # a module that was trained whole is not in the file
        raise CheckpointError(f'adapter {folder} is not whole: {error} is not in its file; save it again') from error
    except Exception as error:  # peft's code, given a stranger's values
        raise CheckpointError(f'adapter {folder} does not fit this base model: {_reason(error, name)}') from error


def _reason(error: Exception, adapter: str) -> str:
    """The first tensor of another shape in torch's long list, or the message."""
    shapes = r'size mismatch for (\S+): .*?shape (.*?) from checkpoint, .*? is (torch.Size\(.*?\))'
    found = re.findall(shapes, str(error))
    if not found:
        return one_line(error)
    name, saved, here = (re.sub(r'torch.Size\((.*)\)', r'\1', text) for text in found[0])
    more = f', and {len(found) - 1} more differ' if len(found) > 1 else ''
    return f'{name.replace(f".{adapter}", "")} is {saved} in its file and {here} in the model{more}'


def _is_copy(name: str, names: Mapping[str, str]) -> bool:
    """Whether peft saved a tensor a second time: it does so beside a resized embedding that was trained whole."""
    trained = name.replace('.modules_to_save.', '.')
    return '.original_module.' in name or (trained != name and trained in names)


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for name in names if (key := _WRAPPERS.sub('', name)) in seen or seen.add(key))  # type: ignore[func-returns-value]
