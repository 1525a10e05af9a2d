"""Runs a model module by module in the memory of its largest layer's block: weights are read when their turn comes.

Everything is computed in float32 by the model's own code. Adapters are attached by peft and computed by peft, from the
tensors of their files: nothing here knows what a merge does with them, so that a merge can be checked against it.
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

_BLOCK_ELEMENTS = 2**20  # of a weight at once; several threads compute on it
_PREFIX = 'base_model.model.'
_WRAPPED = ('.base_layer', '.original_module', '.token_adapter')  # in the names of modules that peft wraps
Opener = Callable[[str], Rows]
"""Opens a tensor by its name in the model."""


class Adapted:
    """A base without memory, with adapters on it that peft attached.

    Args:
        base: The base model's folder.
        adapters: The adapters' folders, each with how much of its change is taken.
        changes: Fields of the config that differ from the base's, such as `vocab_size` after resizing.

    Attributes:
        model: The `peft.PeftModel`.
        changes: As given.

    Raises:
        CheckpointError: an adapter does not fit the base, or is not whole.
    """

    def __init__(
        self, base: Path, adapters: Sequence[tuple[Path, float]], changes: Mapping[str, Any] | None = None
    ) -> None:
        self.changes = changes or {}
        self.model: Any = skeleton(base, changes)
        self._weights = {f'part{number}': weight for number, (_, weight) in enumerate(adapters)}
        self._replaced: dict[str, list[tuple[Tensor, float]]] = {}  # tensors of the base that adapters bring whole
        self._layers: Layerwise | None = None
        for name, (folder, weight) in zip(self._weights, adapters, strict=True):
            self.model = load_adapter(self.model, folder, name=name)
            self._take_replaced(AdapterWeights(folder), weight)
        if len(adapters) > 1 or any(weight != 1 for _, weight in adapters):
            self._weigh()

    def logits(self, rows: Opener, ids: Tensor, device: torch.device) -> Tensor:
        """Logits float32 (N, S, V), on the CPU.

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
            """The base's rows, and what each adapter changes of them."""
            base = before(start, stop).float()
            return base + sum(weight * (tensor[start:stop].float() - base) for tensor, weight in parts)

        return changed

    def _take_replaced(self, weights: AdapterWeights, weight: float) -> None:
        """Takes the base's biases and embeddings that came with an adapter out of the model again."""
        for module_name, module in self.model.get_base_model().named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta or f'{_PREFIX}{module_name}.{name}' not in weights.keys:
                    continue
                place = base_name(f'{module_name}.{name}')
                self._replaced.setdefault(place, []).append((parameter.detach(), weight))
                module._parameters[name] = _nothing(parameter)

    def _weigh(self) -> None:
        """Lets each adapted layer add up its adapters' changes with their weights: layers are linear in their own."""
        done: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if _is_adapted(module) and not (done and name.startswith(done)):
                module.forward = partial(_weighted, module, module.forward, self._weights)
                done += (f'{name}.',)


def base_name(name: str) -> str:
    """The name of a tensor in the base, from its name in the adapted one."""
    for wrapper in _WRAPPED:
        name = name.replace(f'{wrapper}.', '.')
    return name


class Layerwise:
    """A model whose parameters on the meta device are read for each call of the module that needs them.

    Args:
        model: A causal language model, without adapters or with peft's in it.
        device: Where to compute.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._weights = _Weights(model, device)
        module: Any
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:  # peft's copies of the base's rows, which nothing computes with
                    module._buffers[name] = buffer.to(device)
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:  # an adapter's
                    module._parameters[name] = nn.Parameter(parameter.to(device, torch.float32), requires_grad=False)
            self._install(module, prefix)

    @torch.inference_mode()
    def logits(self, rows: Opener, ids: Tensor) -> Tensor:
        """Logits float32 (N, S, V), on the CPU; as `Adapted.logits`."""
        self._weights.rows = rows
        total = sum(parameter.numel() for parameter in self._model.parameters() if parameter.is_meta)
        with Progress(total=total, desc='comparing models', unit='weights', unit_scale=True) as self._weights.progress:
            return self._model(input_ids=ids.to(self._weights.device), use_cache=False).logits.float().cpu()

    def _install(self, module: Any, prefix: str) -> None:
        own, kind = _missing(module, prefix), type(module)
        if _is_adapted(module) and _looks_at_its_base(module):
            inner = {sub: _missing(sub, f'{prefix}.{path}') for path, sub in module.named_modules() if path}
            _fill_for_a_call(module, inner, self._weights)
        if kind is nn.Linear and 'weight' in own:
            module.forward = partial(_linear, module, own, self._weights)
        elif kind is nn.Embedding and own:
            module.forward = partial(_embedding, module, own['weight'], self._weights)
        elif own:
            _fill_for_a_call(module, {module: own}, self._weights)


def _missing(module: nn.Module, prefix: str) -> dict[str, str]:
    """The module's own parameters that have no memory, each with its name in the base."""
    own = module.named_parameters(recurse=False)
    return {name: base_name(f'{prefix}.{name}') for name, parameter in own if parameter.is_meta}


def _nothing(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(like.shape, device='meta'), requires_grad=False)


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _looks_at_its_base(module: Any) -> bool:
    """Whether an adapted layer computes with its base's weight and not only with what the base gives."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    plain = isinstance(module, LoraLayer) and not any(module.use_dora.values())
    return not plain and not isinstance(module, ModulesToSaveWrapper)


def _weighted(module: nn.Module, forward: Callable[..., Tensor], parts: Mapping[str, float], *args: Any) -> Tensor:
    base = _with(module, None, forward, *args)
    return base + sum(weight * (_with(module, name, forward, *args) - base) for name, weight in parts.items())


def _with(module: nn.Module, adapter: str | None, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """What a layer gives with one adapter, or none."""
    layers: list[Any] = [sub for sub in module.modules() if _is_adapted(sub)]
    for layer in layers:
        layer._disable_adapters = adapter is None
        layer._active_adapter = [adapter or '']
    return forward(*args)


class _Weights:
    """The base's tensors, in float32 on the device; `rows` opens them, `progress` counts their values."""

    rows: Opener
    progress: Progress

    def __init__(self, model: Any, device: torch.device) -> None:
        ties = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
        self._ties = {base_name(name): base_name(source) for name, source in ties.items()}
        self.device = device

    def blocks(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Rows of a tensor."""
        rows = self.rows(self._ties.get(name, name))
        for start, stop in ranges:
            block = rows(start, stop).to(self.device, torch.float32)
            self.progress.update(block.numel())
            yield block

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor."""
        blocks = list(self.blocks(name, list(row_blocks(shape, _BLOCK_ELEMENTS))))
        return torch.cat(blocks) if shape else blocks[0]


def _linear(module: nn.Linear, own: Mapping[str, str], weights: _Weights, x: Tensor) -> Tensor:
    """A linear layer by blocks of its outputs."""
    if not module.weight.is_meta:  # filled for a call of the layer around it
        return F.linear(x, module.weight, module.bias)
    shape = tuple(module.weight.shape)
    out = x.new_empty(*x.shape[:-1], shape[0])
    ranges = list(row_blocks(shape, _BLOCK_ELEMENTS))
    for (start, stop), block in zip(ranges, weights.blocks(own['weight'], ranges), strict=True):
        out[..., start:stop] = x @ block.T
    if module.bias is None:
        return out
    return out + (weights.whole(own['bias'], (shape[0],)) if module.bias.is_meta else module.bias)


def _embedding(module: nn.Embedding, name: str, weights: _Weights, ids: Tensor) -> Tensor:
    """The rows that are asked for, one by one."""
    if not module.weight.is_meta:
        return F.embedding(ids, module.weight)
    words, places = ids.unique(return_inverse=True)
    return F.embedding(places, torch.cat(list(weights.blocks(name, [(word, word + 1) for word in words.tolist()]))))


def _fill_for_a_call(module: nn.Module, missing: Mapping[Any, Mapping[str, str]], weights: _Weights) -> None:
    """Lets a module have its parameters, and those of modules in it, while it computes."""
    filled: list[tuple[Any, str]] = []  # not those that the call of a module around this one has filled

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
            part._parameters[name] = _nothing(part._parameters[name])

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty)
