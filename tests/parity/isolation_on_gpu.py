"""What `test_isolation_on_gpu.py` checks, as functions that return what they measured.

    python tests/parity/isolation_on_gpu.py          prints every figure, on a machine with a GPU and without pytest

The reference is each sample alone, attended in float64. The bound of a routine in half precision is what plain scaled
dot-product attention of the sample alone is off by in the same precision: packing may cost no accuracy.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LENGTHS = [7, 1, 129, 64, 300, 5, 33, 2, 512, 16]
SLACK = 2.0  # kernels that add in another order may be off by so many times as much
Result = dict[str, float]


def _tensors(heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator('cuda').manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(total, heads, size), (total, key_heads, size), (total, key_heads, size), (total, heads, size)]
    return [torch.randn(shape, generator=generator, device='cuda').to(dtype) for shape in shapes]


def _alone(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k, v, each sample by itself."""
    parts = []
    for start, end in pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]):
        q, k, v, cotangent = (x[start:end].to(dtype) for x in tensors)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out = out[0].transpose(0, 1)
        parts.append([out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)])
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _ours(tensors: list[Tensor]) -> list[Tensor]:
    from xtuner.fused.attention import attention_for

    q, k, v, cotangent = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()
    attention = attention_for(positions, 1, len(q), device=q.device, dtype=q.dtype, head_size=q.shape[2])
    assert attention.offsets is not None, 'the variable-length routine was not chosen'
    out = attention.forward(q, k, v, q.shape[2] ** -0.5)
    return [out.detach().view_as(cotangent), *torch.autograd.grad(out, (q, k, v), cotangent.reshape(len(q), -1))]


def _torch_varlen(tensors: list[Tensor]) -> list[Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, cotangent = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to('cuda', torch.int32)
    # Of grouped heads, early releases take only as many keys as queries.
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    known = inspect.signature(varlen_attn).parameters
    causal = {'window_size': (-1, 0)} if 'window_size' in known else {'is_causal': True}
    out = varlen_attn(q, keys, values, starts, starts, max(LENGTHS), max(LENGTHS), **causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]


def _errors(got: list[Tensor], expected: list[Tensor]) -> Result:
    """The relative error of the output and of each gradient, in L2 norm."""
    names = ('out', 'dq', 'dk', 'dv')
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, got, expected, strict=True)}


def check_routine(routine: str, dtype: torch.dtype, *, heads: int = 8, key_heads: int = 8, size: int = 128) -> Result:
    """Relative errors of a variable-length routine on a pack, at most `SLACK` times those of the samples alone."""
    tensors = _tensors(heads, key_heads, size, dtype)
    exact = _alone(tensors, torch.float64)
    bound = _errors(_alone(tensors, dtype), exact)
    errors = _errors({'ours': _ours, 'torch': _torch_varlen}[routine](tensors), exact)
    for name, error in errors.items():
        assert error <= SLACK * bound[name] + 1e-6, (name, error, bound[name])
    return {**errors, **{f'alone {name}': error for name, error in bound.items()}}


def check_nothing_leaks(routine: str, dtype: torch.dtype) -> Result:
    """Changing one sample changes no bit of the others' outputs, and changes its own.

    Gradients are summed in any order, so of theirs the same call twice is what others may differ by; the sample is
    changed by a hundred times as much as its values are large.
    """
    run = {'ours': _ours, 'torch': _torch_varlen}[routine]
    tensors = _tensors(8, 8, 128, dtype)
    start = sum(LENGTHS[:4])
    end = start + LENGTHS[4]
    changed = [x.clone() for x in tensors]
    for x in changed[:3]:
        x[start:end] += 100
    before, after, again = run(tensors), run(changed), [run(tensors) for _ in range(4)]
    leaked, moved = [], 0.0
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        moved = max(moved, (a[start:end] - b[start:end]).abs().max().item())
        others = torch.cat((torch.arange(start), torch.arange(end, len(a))))
        noise = max((a[others] - c[number][others]).abs().max().item() for c in again)
        leaked.append((a[others] - b[others]).abs().max().item())
        assert leaked[-1] <= (4 * noise if number else 0.0), (number, leaked[-1], noise)
    assert moved > 0.01, moved
    return {'leaked': max(leaked), 'moved': moved}


def _model(attention: str, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)  # fmt: skip
    return LlamaForCausalLM(config).to('cuda', dtype).train()


def _adapted(llm: Any, dtype: torch.dtype) -> Any:
    """The model frozen in half precision under LoRA with both factors other than 0: which the fused path supports."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llm.to(dtype), LoraConfig(r=8, target_modules='all-linear', task_type='CAUSAL_LM'))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=0.05)
    return adapted.train()


def _items() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    items = []
    for length in LENGTHS:
        ids = torch.randint(1, 512, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        items.append({'input_ids': ids, 'labels': labels, 'position_ids': torch.arange(length)})
    return items


def _loss_and_gradient(model: Any, batches: list[dict[str, Tensor]], dtype: torch.dtype) -> tuple[float, Tensor]:
    """The summed loss of a `SupervisedFinetune` over batches and its gradient, as float64."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            loss = model(**{name: tensor.cuda() for name, tensor in batch.items()})
        loss.backward()
        total += loss.item()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


def check_model(attention: str, dtype: torch.dtype, *, fast: bool = False) -> Result:
    """Loss and gradient of one pack and of its samples one by one, on the model's own or on the fused path."""
    from xtuner.dataset.packing.collate import collate
    from xtuner.fused.enable import enable_fused_training
    from xtuner.objectives.sft import SupervisedFinetune

    items = _items()
    pack = {name: torch.cat([item[name] for item in items]) for name in items[0]}
    llm = _model(attention, torch.float32)  # trained weights are float32 under autocast
    llm = _adapted(llm, dtype) if fast else llm
    model = SupervisedFinetune(llm)
    alone = _loss_and_gradient(model, [collate([item], pad_id=0) for item in items], dtype)
    if fast:
        path = enable_fused_training(llm)
        assert path.enabled, path.reason_disabled
    together = _loss_and_gradient(model, [collate([pack], pad_id=0, multiple_of=64)], dtype)
    loss = abs(together[0] - alone[0]) / alone[0]
    gradient = ((together[1] - alone[1]).norm() / alone[1].norm()).item()
    half = dtype != torch.float32
    assert loss < (2e-3 if half else 1e-5), loss
    assert gradient < (3e-2 if half else 1e-4), gradient
    return {'loss': loss, 'gradient': gradient}


def has_flash_attention_2() -> bool:
    """Whether the flash-attn package, which transformers' implementation of that name needs, is there."""
    return importlib.util.find_spec('flash_attn') is not None


def main() -> int:
    """Runs and prints everything as it comes; returns how many checks failed."""
    half = (torch.bfloat16, torch.float16)
    print(torch.__version__, torch.cuda.get_device_name(), 'flash-attn installed:', has_flash_attention_2())
    failures = 0
    for routine in ('ours', 'torch'):
        for dtype in half:
            for shape in ({}, {'key_heads': 2}, {'size': 64}):
                failures += _shown(check_routine, routine, dtype, **shape)
            failures += _shown(check_nothing_leaks, routine, dtype)
    for attention in ('sdpa', 'eager', *(['flash_attention_2'] if has_flash_attention_2() else [])):
        for dtype in half if attention == 'flash_attention_2' else (torch.float32, *half):
            failures += _shown(check_model, attention, dtype)
    for dtype in half:
        failures += _shown(check_model, 'sdpa', dtype, fast=True)
    print(f'{failures} checks failed')
    return failures


def _shown(check: Callable[..., Result], *arguments: Any, **options: Any) -> int:
    """Prints a check's figures; returns 1 where it failed."""
    name = ' '.join(map(str, (check.__name__, *arguments, options or '')))
    try:
        figures = '  '.join(f'{name} {value:.2e}' for name, value in check(*arguments, **options).items())
    except Exception as error:
        print(f'FAILED  {name}: {type(error).__name__}: {error}', flush=True)
        return 1
    print(f'{name}: {figures}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
