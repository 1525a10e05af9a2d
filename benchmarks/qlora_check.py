"""Checks the fused path on a GPU at the 7B's widths, and times its kernels one by one.

    python benchmarks/qlora_check.py            gradients of a two-layer slice against float32, then the kernels' times

Gradients: the reference is the model's own forward pass with the same 4-bit weights, dequantized to float32; the
error of its own forward pass in bf16 is printed next to ours.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.qlora_model import add_adapter, build_base, set_checkpointing, set_dropout
from xtuner.fused.decoder import FusedDecoder
from xtuner.fused.enable import enable_fused_training, fused_linear_cross_entropy
from xtuner.kernels.dispatch import PLAIN, fused_kernels
from xtuner.kernels.quantized import is_4bit, unpack_weight


def gradients(
    model: Any, ids: Any, positions: Any, *, half: bool = True, fused_loss: bool = False
) -> tuple[float, dict]:
    model.zero_grad()
    base = model.get_base_model()
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    with torch.autocast('cuda', dtype=torch.bfloat16, enabled=half):
        hidden = base.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(
            0, 1
        )
        if fused_loss:
            loss = fused_linear_cross_entropy(hidden, base.lm_head.weight, None, labels)
        else:
            loss = torch.nn.functional.cross_entropy(base.lm_head(hidden).float(), labels, reduction='sum')
    (loss / len(labels)).backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def errors(grads: dict, exact: dict) -> str:
    each = {n: float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact}
    total = sum(float((grads[n] - exact[n]).square().sum()) for n in exact) / sum(
        float(e.square().sum()) for e in exact.values()
    )
    worst = max(each, key=lambda n: each[n])
    return f'all {total**0.5:.2e}, worst {each[worst]:.2e} ({worst.split("layers.")[1]})'


def dequantised(model: Any) -> Any:
    """The same weights in float32, as plain layers."""
    from bitsandbytes.functional import dequantize_4bit

    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if is_4bit(module):
            new = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device='meta')
            new.weight = torch.nn.Parameter(dequantize_4bit(module.weight.data, module.weight.quant_state), False)
            if module.bias is not None:
                new.bias = torch.nn.Parameter(module.bias.data.clone(), False)
            parent, _, name = path.rpartition('.')
            setattr(twin.get_submodule(parent), name, new)
    twin = twin.float()
    twin.get_base_model().enable_input_require_grads()
    return twin


def check() -> None:
    ids = torch.randint(3, 100_000, (2, 512), device='cuda')
    dense = torch.arange(512, device='cuda').expand(2, -1).contiguous()
    packed = dense.clone()
    packed[0] = torch.cat((torch.arange(100), torch.arange(257), torch.arange(155)))
    model = add_adapter(build_base('cuda', num_hidden_layers=2), dropout=0.5)
    set_dropout(model, 0.0)
    for name, positions in (('dense', dense), ('packed', packed)):
        enable_fused_training(model, enabled=False)
        exact_loss, exact = gradients(dequantised(model), ids, positions, half=False)
        stock_loss, stock = gradients(model, ids, positions)
        print(f'{name}: exact loss {exact_loss:.4f}; stock loss {stock_loss:.4f}, gradients {errors(stock, exact)}')
        print(enable_fused_training(model))
        ways = (False,) * 5 + (True,) * 4  # cuDNN from the second batch of a form on, graphs from the fifth
        for checkpointing in ways:
            set_checkpointing(model, checkpointing)
            loss, grads = gradients(model, ids, positions, fused_loss=True)
            print(
                f'  ours, checkpointing {checkpointing}: loss {loss:.4f}, gradients {errors(grads, exact)}', flush=True
            )
    set_dropout(model, 0.1)
    decoder: Any = model.get_base_model().model
    results = []
    for kernels, folded in ((PLAIN, False), (fused_kernels(), True)):
        decoder.forward.fused = FusedDecoder(decoder, kernels, fused_lora=folded)
        torch.manual_seed(3)
        results.append(gradients(model, ids, dense)[1])
    print('dropout 0.1, Triton against plain (same masks):', errors(results[1], results[0]), flush=True)
    check_repeats(model, ids, dense)
    set_dropout(model, 0.0)
    check_fp8(model, ids, dense)


def check_repeats(model: Any, ids: Any, positions: Any) -> None:
    """Under dropout: the ordinary way, recorded graphs, and recomputation draw the same masks."""
    results = []
    for name, checkpointing, room in (('kept', False, None), ('again', True, None), ('by memory', False, 0)):
        set_checkpointing(model, checkpointing)
        enable_fused_training(model, recompute_by_memory=room is not None)
        fused = model.get_base_model().model.forward.fused
        fused.memory.budget = room
        for _ in range(7):  # graphs from the fifth on
            torch.manual_seed(3)
            results.append(gradients(model, ids, positions, fused_loss=True)[1])
        print(f'dropout 0.1, {name}: graphs {fused.graphs.graphs is not None}, against the third batch:',
              [errors(r, results[2]) for r in results[-7:]], flush=True)  # fmt: skip


def check_fp8(model: Any, ids: Any, positions: Any) -> None:
    """Gradients in FP8 against float32, and what the pieces cost."""
    enable_fused_training(model, enabled=False)
    _, exact = gradients(dequantised(model), ids, positions, half=False)
    for checkpointing in (False, True):
        set_checkpointing(model, checkpointing)
        print(enable_fused_training(model, fp8=True))
        for _ in range(6):
            loss, grads = gradients(model, ids, positions, fused_loss=True)
        print(f'  fp8, checkpointing {checkpointing}: loss {loss:.4f}, gradients {errors(grads, exact)}', flush=True)


def time_fp8(tokens: int) -> None:
    """Rounding, weights and products at the 7B's widths; rank 64 appended."""
    import bitsandbytes as bnb
    from triton.testing import do_bench

    k, scale = fused_kernels(), torch.tensor(1e-3, device='cuda')
    for n, m in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)):
        x = torch.randn(tokens, m, device='cuda', dtype=torch.bfloat16)
        tail = torch.randn(tokens, 64, device='cuda', dtype=torch.bfloat16)
        timed(f'quantize_rows {tokens}x{m}', lambda x=x, t=tail: k.quantize_rows(x, t), tokens * m * 3)
        linear = bnb.nn.Linear4bit(m, n, bias=False, quant_type='nf4', device='cuda')
        data = torch.randn(n, m, device='cuda', dtype=torch.bfloat16) * 0.02
        linear.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type='nf4').to('cuda')
        parts = unpack_weight(linear)
        weight = torch.zeros(n, m + 64, device='cuda').to(torch.float8_e4m3fn)
        turned = torch.zeros(m, n + 64, device='cuda').to(torch.float8_e4m3fn)
        size = n * m * (1.5 + 1 / 64)
        timed(f'dequantise to FP8 {n}x{m}', lambda p=parts, w=weight, m=m: k.dequantize_into(w[:, :m], p, scale), size)
        timed('  transposed', lambda p=parts, w=turned, n=n: k.dequantize_transposed_into(w[:, :n], p, scale), size)
        rounded, scales = k.quantize_rows(x, tail)
        columns = torch.ones(1, n, device='cuda')
        for fast in (False, True):
            ms = do_bench(
                lambda f=fast, r=rounded, s=scales, w=weight, c=columns: torch._scaled_mm(
                    r, w.t(), s, c, out_dtype=torch.bfloat16, use_fast_accum=f
                ),
                warmup=10, rep=60, return_mode='median',
            )  # fmt: skip
            print(
                f'  product {n}x{m}, fast accumulation {fast}: {ms:.3f} ms, {2 * tokens * n * m / ms / 1e9:.0f} TFLOP/s'
            )
        wide = torch.randn(n, m + 64, device='cuda', dtype=torch.bfloat16)
        both = torch.cat((x, tail), 1)
        ms = do_bench(lambda b=both, w=wide: b @ w.t(), warmup=10, rep=60, return_mode='median')
        print(f'  in bfloat16: {ms:.3f} ms, {2 * tokens * n * m / ms / 1e9:.0f} TFLOP/s', flush=True)


def timed(name: str, function: Any, num_bytes: float) -> None:
    from triton.testing import do_bench

    ms = do_bench(function, warmup=10, rep=60, return_mode='median')
    print(f'{name:46s} {ms:7.4f} ms  {num_bytes / ms / 1e9:6.2f} TB/s', flush=True)


def time_kernels(tokens: int) -> None:
    import bitsandbytes as bnb

    k = fused_kernels()
    h, i, r = 4096, 11008, 64
    seed = torch.tensor(7, device='cuda')
    new = lambda *shape: torch.randn(*shape, device='cuda', dtype=torch.bfloat16)  # noqa: E731
    for n, m in ((h, h), (i, h), (h, i)):
        linear = bnb.nn.Linear4bit(m, n, bias=False, quant_type='nf4', device='cuda')
        linear.weight = bnb.nn.Params4bit(new(n, m), requires_grad=False, quant_type='nf4').to('cuda')
        parts, wide = unpack_weight(linear), torch.empty(n, m + r, device='cuda', dtype=torch.bfloat16)
        size = n * m * (2.5 + 1 / 64)
        timed(f'dequantise {n}x{m}', lambda p=parts, w=wide, m=m: k.dequantize_into(w[:, :m], p), size)
        timed('  bitsandbytes', lambda m=linear.weight: bnb.functional.dequantize_4bit(m.data, m.quant_state), size)
    x, wide, weight = new(tokens, h), new(tokens, h + 192), new(h)
    unit = tokens * h * 2
    rstd = k.rms_norm(x, weight, 1e-6, wide[:, :h])
    timed('rms_norm', lambda: k.rms_norm(x, weight, 1e-6, wide[:, :h]), 2 * unit)
    timed('rms_norm_backward', lambda: k.rms_norm_backward(x, x, rstd, weight, x), 4 * unit)
    qkv, angles = new(tokens, 3 * h), torch.randn(tokens, 64, device='cuda')
    heads = qkv.unflatten(1, (96, 128))[:, :64]
    timed('rotate q and k in place', lambda: k.rotate(heads, angles, angles, heads, inverse=False), 4 * unit)
    gate_up, act = new(tokens, 2 * i + 128), new(tokens, i + r)
    timed('swiglu', lambda: k.swiglu(gate_up[:, : 2 * i], act[:, :i]), 3 * tokens * i * 2)
    dact = new(tokens, i)
    timed('swiglu_backward', lambda: k.swiglu_backward_(dact, gate_up[:, : 2 * i]), 6 * tokens * i * 2)
    for width in (h, i):
        x, a, dxa = new(tokens, width), new(r, width), new(tokens, r)
        once = tokens * width * 2
        timed(f'dropout_project {width}', lambda x=x, a=a, d=dxa: k.dropout_project(x, a, 0.1, seed, d), once)
        timed('  x A as a plain product', lambda x=x, a=a: x @ a.t(), once)
        timed('dropout_project_weight_grad', lambda x=x, d=dxa: k.dropout_project_weight_grad(d, x, 0.1, seed), once)
        timed('  as a plain product', lambda x=x, d=dxa: torch.mm(d.t(), x, out_dtype=torch.float32), once)
        args = (x, dxa, a, 0.1, seed)
        timed('dropout_project_input_grad_', lambda args=args: k.dropout_project_input_grad_(*args), 2 * once)
    logits, targets = new(1024, 103168), torch.randint(0, 103168, (1024,), device='cuda')
    timed('cross_entropy 1024x103168', lambda: k.cross_entropy_(logits, targets), 3 * logits.numel() * 2)
    dx = new(tokens, h)
    timed('copy T x H', lambda: dx.clone(), 2 * unit)


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check()
    time_fp8(8192)
    for tokens in (2048, 8192):
        print(f'kernels at {tokens} tokens')
        time_kernels(tokens)


if __name__ == '__main__':
    main()
