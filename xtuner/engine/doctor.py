"""Diagnoses this machine: tests everything that a run needs, and reports it in a form to paste into an issue.

The report contains nothing personal: home folders are written as `~`, and user and host names are omitted.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch import Tensor

from xtuner.dataset.cache.build_once import cache_root
from xtuner.kernels.dispatch import fused_kernels, has_triton
from xtuner.kernels.quantized import unpack_weight
from xtuner.tracking.environment import devices, versions

OK, FAILED, ABSENT, NOTE = 'ok', 'FAILED', 'absent', 'note'
_OPTIONAL = ('triton', 'wandb', 'modelscope', 'deepspeed', 'flash-attn', 'tensorboard')
_HALF_TOLERANCE = 0.02  # relative error of float16 and bfloat16 products against float32
_MIN_FREE_GIB = 5  # for prepared data and a few checkpoints


@dataclass(frozen=True)
class Check:
    """Result of one test.

    Attributes:
        name: What was tested.
        state: `OK`; `FAILED`: something required fails; `ABSENT`: missing but optional; `NOTE`: for information.
        detail: What was found.
        advice: What to do, if anything.
    """

    name: str
    state: str
    detail: str = ''
    advice: str = ''


def examine() -> list[Check]:
    """Runs all checks; an unexpected error is a failed check, never an exception."""
    checks = [*_guarded('dependencies', check_dependencies), *_guarded('GPU', check_gpu)]
    checks += _guarded('4-bit product on the CPU', lambda: [check_4bit(torch.device('cpu'))])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device('cuda', index)
        for name, check in (
            ('4-bit product', check_4bit), ('Triton kernels', check_triton), ('cuDNN attention', check_attention),
        ):  # fmt: skip
            checks += _guarded(f'{name} on {device}', lambda check=check, device=device: [check(device)])  # type: ignore[misc]
    return [*checks, *_guarded('cache folder', lambda: [check_cache()])]


def report(checks: list[Check]) -> list[str]:
    """Returns the report in Markdown: versions, machine, checks, and advice."""
    machine = devices()
    lines = ['### xtuner doctor', '', '| | |', '| --- | --- |']
    lines += [f'| {name} | {version} |' for name, version in {**versions(), **_optional()}.items()]
    lines += [f'| {name} | {value} |' for name, value in machine.items() if name != 'gpus' and value is not None]
    lines += [
        f'| GPU {i} | {gpu["name"]}, {gpu["memory_gib"]} GiB, compute capability {gpu["capability"]} |'
        for i, gpu in enumerate(machine['gpus'])
    ]
    driver = driver_version()
    lines += [f'| driver | {driver} |'] if driver else []
    lines.append('')
    lines += [f'- {check.state}: {check.name}{": " + check.detail if check.detail else ""}' for check in checks]
    advice = [f'{i}. {check.name}: {check.advice}' for i, check in enumerate((c for c in checks if c.advice), 1)]
    if advice:
        lines += ['', 'What to do:', '', *advice]
    return [without_home(line) for line in lines]


def check_dependencies() -> list[Check]:
    """Whether every declared dependency is installed in a tested version."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires('xtuner') or []]
    except importlib.metadata.PackageNotFoundError:
        return [Check('dependencies', NOTE, 'xtuner runs from a checkout that is not installed', 'pip install -e .')]
    checks = []
    needed = [r for r in declared if r.marker is None or r.marker.evaluate({'extra': ''})]
    for requirement in needed:
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            checks.append(Check(requirement.name, FAILED, 'not installed', advice))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            text = f'{installed} is untested, {requirement.specifier} is tested'
            advice = f"if something breaks: pip install '{requirement.name}{requirement.specifier}'"
            checks.append(Check(requirement.name, NOTE, text, advice))
    return checks or [Check('dependencies', OK, f'{len(needed)}, all in tested versions')]


def check_gpu() -> list[Check]:
    """Whether torch finds the GPUs that the driver has."""
    if torch.cuda.is_available():
        return [Check('GPU', OK, f'{torch.cuda.device_count()}, CUDA {torch.version.cuda}')]
    if driver_version() is None:
        return [Check('GPU', ABSENT, 'no NVIDIA driver; runs train on the CPU')]
    if torch.version.cuda is None:
        return [Check('GPU', FAILED, 'this torch is built without CUDA', 'install a CUDA build of torch: pytorch.org')]
    text = f'torch (CUDA {torch.version.cuda}) finds no GPU under driver {driver_version()}'
    return [Check('GPU', FAILED, text, 'update the driver, or install a torch built for an older CUDA; see nvidia-smi')]


def check_4bit(device: torch.device) -> Check:
    """Compares a frozen 4-bit layer, forward and backward, with a product of its dequantized weights."""
    import bitsandbytes as bnb

    from xtuner.kernels import reference

    torch.manual_seed(0)
    dtype = torch.float32 if device.type == 'cpu' else torch.float16
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type='nf4').to(device)
    layer.support_avx512bf16_for_cpu = False  # as in xtuner's model loading: the other layout has no backward pass
    x = torch.randn(8, 128, device=device, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.float().square().sum().backward()
    floats = torch.empty(64, 128, device=device)
    reference.dequantize_into(floats, unpack_weight(layer))
    expected = x.detach().float() @ floats.t()
    assert x.grad is not None
    error = max(_error(out, expected), _error(x.grad, 2 * expected @ floats))
    return _compared(f'4-bit product on {_device_text(device)}, forward and backward', error, _bnb_advice(device))


def check_triton(device: torch.device) -> Check:
    """Compiles one of the fused path's kernels and compares it with plain PyTorch."""
    name = f'Triton kernels on {_device_text(device)}'
    if not has_triton():
        return Check(name, ABSENT, 'Triton is not installed', 'pip install triton: training is faster with it')
    from xtuner.kernels import reference

    x = torch.randn(64, 256, device=device, dtype=torch.float16)
    weight, out, expected = torch.ones_like(x[0]), torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device(device):
        fused_kernels().rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(x, weight, 1e-6, expected)
    return _compared(name, _error(out, expected), 'reinstall triton in the version that this torch requires')


def check_attention(device: torch.device) -> Check:
    """Compares cuDNN's attention, forward and backward, with float32; used for compute capability 8.0 and above."""
    name = f'cuDNN attention on {_device_text(device)}'
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cudnn.is_available():
        return Check(name, ABSENT, "needs compute capability 8.0 and cuDNN; PyTorch's own attention is used")
    q, k, v = (torch.randn(1, 4, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=0.125)[0]
    out.float().sum().backward()
    reference = torch.nn.functional.scaled_dot_product_attention(
        q.detach().float(), k.detach().float(), v.detach().float(), is_causal=True, scale=0.125
    )
    return _compared(name, _error(out, reference), 'reinstall torch with its own cuDNN (nvidia-cudnn)')


def check_cache() -> Check:
    """Whether the cache folder is writable, and its free space."""
    root = cache_root()
    advice = 'set XTUNER_CACHE to a folder that can be written'
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root) as file:
            file.write(b'x')
    except OSError as error:
        return Check('cache folder', FAILED, f'{root}: {error.strerror}', advice)
    free = shutil.disk_usage(root).free / 2**30
    text = f'{root}, {free:.0f} GiB free'
    return Check('cache folder', OK, text) if free >= _MIN_FREE_GIB else Check('cache folder', NOTE, text, advice)


def driver_version() -> str | None:
    """The NVIDIA driver's version, None without a driver."""
    try:
        text = Path('/proc/driver/nvidia/version').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return 'unknown' if torch.cuda.is_available() else None
    words = text.splitlines()[0].split() if text else []
    return next((word for word in words if word[:1].isdigit() and '.' in word), 'unknown')


def without_home(text: str) -> str:
    """Replaces the home folder by `~`."""
    home = str(Path.home())
    return text.replace(home, '~') if len(home) > 1 else text


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    try:
        return check()
    except Exception as error:  # a broken installation can raise anything
        text = ' '.join(str(error).split()) or type(error).__name__
        advice = 'reinstall the package named in the message'
        if '4-bit' in name:
            advice = _bnb_advice(torch.device('cuda' if 'cuda' in name else 'cpu'))
        return [Check(name, FAILED, f'{type(error).__name__}: {text[:300]}', advice)]


def _compared(name: str, error: float, advice: str) -> Check:
    if not error < _HALF_TOLERANCE:  # also true for NaN
        return Check(name, FAILED, f'max relative error {error:.2%}', advice)
    return Check(name, OK, f'max relative error {error:.1e}')


def _error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to the expected norm."""
    return float((actual.detach().float() - expected.float()).norm() / expected.float().norm())


def _device_text(device: torch.device) -> str:
    return 'the CPU' if device.type == 'cpu' else str(device)


def _bnb_advice(device: torch.device) -> str:
    build = '' if device.type == 'cpu' else f' with kernels for CUDA {torch.version.cuda}'
    return f'install a bitsandbytes{build} (pip install -U bitsandbytes), or use a lora config, which does not need it'


def _optional() -> dict[str, str]:
    result = {}
    for name in _OPTIONAL:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = 'not installed (optional)'
    return result
