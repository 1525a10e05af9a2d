"""What works on this machine: each thing that a run needs, tried for real, in a form to paste into an issue.

Nothing personal is in it: home folders are written `~`, and no name of a user or a machine is asked for.
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
_HALF_TOLERANCE = 0.02  # of float16 and bfloat16 products against float32 ones of the same numbers
_LEAST_FREE_GIB = 5  # for prepared data and a few checkpoints


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What.
        state: `OK`; `FAILED`: something needed does not work; `ABSENT`: not there, and not needed; `NOTE`: to be known.
        detail: What was found.
        advice: What to do, where there is something.
    """

    name: str
    state: str
    detail: str = ''
    advice: str = ''


def examine() -> list[Check]:
    """Tries everything; an unexpected error is a failed check, never an exception."""
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
    """Markdown: versions, machine, checks, and what to do."""
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
    """Every declared dependency: there, and of a version that was tested."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires('xtuner') or []]
    except importlib.metadata.PackageNotFoundError:
        return [Check('dependencies', NOTE, 'xtuner runs from a checkout that is not installed', 'pip install -e .')]
    checks = []
    needed = [r for r in declared if r.marker is None or r.marker.evaluate({'extra': ''})]
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            checks.append(Check(requirement.name, FAILED, 'not installed', advice))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            text = f'{found} is untested, {requirement.specifier} is tested'
            advice = f"if something breaks: pip install '{requirement.name}{requirement.specifier}'"
            checks.append(Check(requirement.name, NOTE, text, advice))
    return checks or [Check('dependencies', OK, f'{len(needed)}, all of tested versions')]


def check_gpu() -> list[Check]:
    """Whether torch sees the GPUs that the driver has."""
    if torch.cuda.is_available():
        return [Check('GPU', OK, f'{torch.cuda.device_count()}, CUDA {torch.version.cuda}')]
    if driver_version() is None:
        return [Check('GPU', ABSENT, 'no NVIDIA driver; runs train on the CPU')]
    if torch.version.cuda is None:
        return [Check('GPU', FAILED, 'this torch is built without CUDA', 'install a CUDA build of torch: pytorch.org')]
    text = f'torch (CUDA {torch.version.cuda}) finds no GPU under driver {driver_version()}'
    return [Check('GPU', FAILED, text, 'update the driver, or install a torch built for an older CUDA; see nvidia-smi')]


def check_4bit(device: torch.device) -> Check:
    """A frozen 4-bit layer, forward and backward, against a product with its weights as we turn them into floats."""
    import bitsandbytes as bnb

    from xtuner.kernels import reference

    torch.manual_seed(0)
    dtype = torch.float32 if device.type == 'cpu' else torch.float16
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type='nf4').to(device)
    layer.support_avx512bf16_for_cpu = False  # as xtuner loads models: the other layout has no backward pass
    x = torch.randn(8, 128, device=device, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.float().square().sum().backward()
    floats = torch.empty(64, 128, device=device)
    reference.dequantize_into(floats, unpack_weight(layer))
    expected = x.detach().float() @ floats.t()
    assert x.grad is not None
    error = max(_error(out, expected), _error(x.grad, 2 * expected @ floats))
    return _compared(f'4-bit product on {_short(device)}, forward and backward', error, _bnb_advice(device))


def check_triton(device: torch.device) -> Check:
    """One of the fast path's kernels, compiled and compared with plain PyTorch."""
    name = f'Triton kernels on {_short(device)}'
    if not has_triton():
        return Check(name, ABSENT, 'Triton is not installed', 'pip install triton: training is faster with it')
    from xtuner.kernels import reference

    x = torch.randn(64, 256, device=device, dtype=torch.float16)
    weight, out, expected = torch.ones_like(x[0]), torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device(device):
        fused_kernels().rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(x, weight, 1e-6, expected)
    return _compared(name, _error(out, expected), 'reinstall triton in the version that this torch asks for')


def check_attention(device: torch.device) -> Check:
    """cuDNN's attention, forward and backward, against float32; used from compute capability 8.0 on."""
    name = f'cuDNN attention on {_short(device)}'
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
    """Whether prepared data can be written, and how much room there is."""
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
    return Check('cache folder', OK, text) if free >= _LEAST_FREE_GIB else Check('cache folder', NOTE, text, advice)


def driver_version() -> str | None:
    """The NVIDIA driver's version, None without one."""
    try:
        text = Path('/proc/driver/nvidia/version').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return 'unknown' if torch.cuda.is_available() else None
    words = text.splitlines()[0].split() if text else []
    return next((word for word in words if word[:1].isdigit() and '.' in word), 'unknown')


def without_home(text: str) -> str:
    """Text with `~` for the home folder."""
    home = str(Path.home())
    return text.replace(home, '~') if len(home) > 1 else text


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    try:
        return check()
    except Exception as error:  # a broken installation fails in any way it likes
        text = ' '.join(str(error).split()) or type(error).__name__
        advice = 'reinstall what the message names'
        if '4-bit' in name:
            advice = _bnb_advice(torch.device('cuda' if 'cuda' in name else 'cpu'))
        return [Check(name, FAILED, f'{type(error).__name__}: {text[:300]}', advice)]


def _compared(name: str, error: float, advice: str) -> Check:
    if not error < _HALF_TOLERANCE:  # also where it is not a number
        return Check(name, FAILED, f'wrong by {error:.2%}', advice)
    return Check(name, OK, f'off by {error:.1e}')


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the expected norm."""
    return float((found.detach().float() - expected.float()).norm() / expected.float().norm())


def _short(device: torch.device) -> str:
    return 'the CPU' if device.type == 'cpu' else str(device)


def _bnb_advice(device: torch.device) -> str:
    build = '' if device.type == 'cpu' else f' with kernels for CUDA {torch.version.cuda}'
    return f'install a bitsandbytes{build} (pip install -U bitsandbytes), or use a lora config, which does not need it'


def _optional() -> dict[str, str]:
    found = {}
    for name in _OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = 'not installed (optional)'
    return found
