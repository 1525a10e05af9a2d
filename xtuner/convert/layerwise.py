"""Runs a model module by module with memory for one block of a layer's weight: weights are read when needed.

Everything is computed in float32 by the model's own code. Adapters are attached and computed by peft from their files,
independently of the merge code, so that a merge can be verified against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.adapters.delta import Rows
from xtuner.adapters.load import AdapterWeights, load_adapter
from xtuner.convert.base import skeleton
from xtuner.model.weights.blocks import row_blocks
from xtuner.utils.progress import Progress

_BLOCK_ELEMENTS = 2**20  # elements of a weight per block; several threads compute on it
_PREFIX = 'base_model.model.'
_WRAPPED = ('.base_layer', '.original_module', '.token_adapter')  # name parts that peft adds when it wraps modules
Opener = Callable[[str], Rows]
"""Opens a tensor by its name in the model."""


class Adapted:
    """A base model on the meta device with adapters attached by peft.

    Args:
        base: The base model's folder.
        adapters: The adapters' folders and weights.
        changes: Fields of the config that differ from the base's, such as `vocab_size` after resizing.

    Attributes:
        model: The `peft.PeftModel`.
        changes: As passed in.

    Raises:
        CheckpointError: An adapter does not fit the base, or is incomplete.
    """

    def __init__(
        self, base: Path, adapters: Sequence[tuple[Path, float]], changes: Mapping[str, Any] | None = None
    ) -> None:
        self.changes = changes or {}
        self.model: Any = skeleton(base, changes)
        self._weights = {f'part{number}': weight for number, (_, weight) in enumerate(adapters)}
        self._replaced: dict[str, list[tuple[Tensor, float]]] = {}  # base tensors that adapters replace
        self._layers: Layerwise | None = None
        for name, (folder, weight) in zip(self._weights, adapters, strict=True):
            self.model = load_adapter(self.model, folder, name=name)
            self._take_replaced(AdapterWeights(folder), weight)
        if len(adapters) > 1 or any(weight != 1 for _, weight in adapters):
            self._apply_weights()

    def logits(self, rows: Opener, ids: Tensor, device: torch.device) -> Tensor:
        """Returns logits, float32 (N, S, V), on the CPU.

        Args:
            rows: Opens a tensor of the base.
            ids: int64 (N, S).
            device: Where to compute; the same at each call.
        """
        if self._layers is None:
            self._layers = Layerwise(self.model.get_base_model(), device)
        return self._layers.logits(partial(self._open, rows), ids)

    def _open(self, rows: Opener, name: str) -> Rows:
        parts = self._replaced.get(name)
        if parts is None:
            return rows(name)
        if len(parts) == 1 and parts[0][1] == 1:
            return lambda start, stop: parts[0][0][start:stop]
        before = rows(name)

        def changed(start: int, stop: int) -> Tensor:
            """The base's rows plus the weighted changes of all adapters."""
            base = before(start, stop).float()
            return base + sum(weight * (tensor[start:stop].float() - base) for tensor, weight in parts)

        return changed

    def _take_replaced(self, weights: AdapterWeights, weight: float) -> None:
        """Moves biases and embeddings that an adapter brings from the model into `_replaced`."""
        for module_name, module in self.model.get_base_model().named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta or f'{_PREFIX}{module_name}.{name}' not in weights.keys:
                    continue
                name_in_base = base_name(f'{module_name}.{name}')
                self._replaced.setdefault(name_in_base, []).append((parameter.detach(), weight))
                module._parameters[name] = _meta_parameter(parameter)

    def _apply_weights(self) -> None:
        """Makes each adapted layer sum its adapters' weighted changes; its output is linear in them."""
        done: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if _is_adapted(module) and not (done and name.startswith(done)):
                module.forward = partial(_weighted, module, module.forward, self._weights)
                done += (f'{name}.',)


def base_name(name: str) -> str:
    """Returns the name of a tensor in the base, from its name in the adapted model."""
    for wrapper in _WRAPPED:
        name = name.replace(f'{wrapper}.', '.')
    return name


class Layerwise:
    """A model whose meta parameters are loaded for each call of the module that needs them.

    Args:
        model: A causal language model, without adapters or with peft's in it.
        device: Where to compute.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._weights = _BaseWeights(model, device)
        module: Any
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:  # peft's copies of base rows, unused in computation
                    module._buffers[name] = buffer.to(device)
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:  # an adapter's
                    module._parameters[name] = nn.Parameter(parameter.to(device, torch.float32), requires_grad=False)
            self._install(module, prefix)

    @torch.inference_mode()
    def logits(self, rows: Opener, ids: Tensor) -> Tensor:
        """Returns logits, float32 (N, S, V), on the CPU; see `Adapted.logits`."""
        self._weights.rows = rows
        total = sum(parameter.numel() for parameter in self._model.parameters() if parameter.is_meta)
        with Progress(total=total, desc='comparing models', unit='weights', unit_scale=True) as self._weights.progress:
            return self._model(input_ids=ids.to(self._weights.device), use_cache=False).logits.float().cpu()

    def _install(self, module: Any, prefix: str) -> None:
        meta, kind = _meta_parameters(module, prefix), type(module)
        if _is_adapted(module) and _reads_base_weight(module):
            inner = {sub: _meta_parameters(sub, f'{prefix}.{path}') for path, sub in module.named_modules() if path}
            _load_during_call(module, inner, self._weights)
        if kind is nn.Linear and 'weight' in meta:
            module.forward = partial(_linear, module, meta, self._weights)
        elif kind is nn.Embedding and meta:
            module.forward = partial(_embedding, module, meta['weight'], self._weights)
        elif meta:
            _load_during_call(module, {module: meta}, self._weights)


def _meta_parameters(module: nn.Module, prefix: str) -> dict[str, str]:
    """The module's own parameters on the meta device, each with its name in the base."""
    parameters = module.named_parameters(recurse=False)
    return {name: base_name(f'{prefix}.{name}') for name, parameter in parameters if parameter.is_meta}


def _meta_parameter(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(like.shape, device='meta'), requires_grad=False)


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _reads_base_weight(module: Any) -> bool:
    """Whether an adapted layer computes with its base layer's weight, not only with its output."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    plain = isinstance(module, LoraLayer) and not any(module.use_dora.values())
    return not plain and not isinstance(module, ModulesToSaveWrapper)


def _weighted(module: nn.Module, forward: Callable[..., Tensor], parts: Mapping[str, float], *args: Any) -> Tensor:
    base = _with(module, None, forward, *args)
    return base + sum(weight * (_with(module, name, forward, *args) - base) for name, weight in parts.items())


def _with(module: nn.Module, adapter: str | None, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """Output of a layer with one adapter enabled, or none."""
    layers: list[Any] = [sub for sub in module.modules() if _is_adapted(sub)]
    for layer in layers:
        layer._disable_adapters = adapter is None
        layer._active_adapter = [adapter or '']
    return forward(*args)


class _BaseWeights:
    """The base's tensors, in float32 on the device; `rows` opens them, `progress` counts their values."""

    rows: Opener
    progress: Progress

    def __init__(self, model: Any, device: torch.device) -> None:
        ties = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
        self._ties = {base_name(name): base_name(source) for name, source in ties.items()}
        self.device = device

    def blocks(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Yields ranges of a tensor's rows."""
        rows = self.rows(self._ties.get(name, name))
        for start, stop in ranges:
            block = rows(start, stop).to(self.device, torch.float32)
            self.progress.update(block.numel())
            yield block

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a whole tensor."""
        blocks = list(self.blocks(name, list(row_blocks(shape, _BLOCK_ELEMENTS))))
        return torch.cat(blocks) if shape else blocks[0]


def _linear(module: nn.Linear, names: Mapping[str, str], weights: _BaseWeights, x: Tensor) -> Tensor:
    """Computes a linear layer block by block of its outputs."""
    if not module.weight.is_meta:  # loaded for a call of the enclosing layer
        return F.linear(x, module.weight, module.bias)
    shape = tuple(module.weight.shape)
    out = x.new_empty(*x.shape[:-1], shape[0])
    ranges = list(row_blocks(shape, _BLOCK_ELEMENTS))
    for (start, stop), block in zip(ranges, weights.blocks(names['weight'], ranges), strict=True):
        out[..., start:stop] = x @ block.T
    if module.bias is None:
        return out
    return out + (weights.whole(names['bias'], (shape[0],)) if module.bias.is_meta else module.bias)


def _embedding(module: nn.Embedding, name: str, weights: _BaseWeights, ids: Tensor) -> Tensor:
    """Reads only the requested rows of an embedding."""
    if not module.weight.is_meta:
        return F.embedding(ids, module.weight)
    tokens, inverse = ids.unique(return_inverse=True)
    rows = weights.blocks(name, [(token, token + 1) for token in tokens.tolist()])
    return F.embedding(inverse, torch.cat(list(rows)))


def _load_during_call(module: nn.Module, missing: Mapping[Any, Mapping[str, str]], weights: _BaseWeights) -> None:
    """Loads the parameters of a module, and of modules in it, for the duration of each call."""
    filled: list[tuple[Any, str]] = []  # without those loaded by an enclosing module's call

    def fill(_: nn.Module, args: Any) -> None:
        for part, names in missing.items():
            for name, path in names.items():
                parameter = part._parameters[name]
                if parameter.is_meta:
                    whole = weights.whole(path, tuple(parameter.shape))
                    part._parameters[name] = nn.Parameter(whole, requires_grad=False)
                    filled.append((part, name))

    def empty(_: nn.Module, args: Any, output: Any) -> None:
        while filled:
            part, name = filled.pop()
            part._parameters[name] = _meta_parameter(part._parameters[name])

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty)
