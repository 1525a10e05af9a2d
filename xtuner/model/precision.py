"""Selects the compute dtype."""

from __future__ import annotations

import torch

from xtuner.errors import ConfigError

_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}


def default_device() -> torch.device:
    """This process's CUDA device if there is one, else the CPU."""
    return torch.device('cuda', torch.cuda.current_device()) if torch.cuda.is_available() else torch.device('cpu')


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of products.

    Args:
        name: 'auto', 'bf16', 'fp16' or 'fp32'. 'auto' is float32 on a CPU; on a GPU bfloat16 if the hardware supports
            it (compute capability 8.0 and above), else float16, which training combines with loss scaling.
        device: Where the model will run.

    Raises:
        ConfigError: float16 on a CPU, where training with it is neither fast nor stable.
    """
    if name == 'auto':
        if device.type != 'cuda':
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name == 'fp16' and device.type == 'cpu':
        raise ConfigError('`model.dtype` is fp16, which needs a GPU; use auto, fp32 or bf16 on this machine')
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Config name of a dtype: 'bf16', 'fp16' or 'fp32'."""
    return next(name for name, value in _DTYPES.items() if value == dtype)
