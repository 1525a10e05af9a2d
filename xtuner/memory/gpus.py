"""GPU specifications by name, and training speed estimates: peak FLOPS times a measured utilization."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xtuner.errors import UsageError, nearest
from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.memory.predict import Setup

# Share of the peak that a training step reached on an H200 (benchmarks/qlora_step_h200_2026-11-23.md): the fused path
# with large and with small micro-batches, and transformers' own forward pass. For other GPUs these are assumptions.
_UTILIZATION = {'large': 0.55, 'small': 0.45, 'stock': 0.2}


@dataclass(frozen=True)
class GpuSpec:
    """Specification of a GPU.

    Attributes:
        name: Its name in this package.
        gib: Memory reported by the driver, in GiB.
        tflops: Dense half-precision tensor peak with float32 accumulation, from the vendor's data sheet; 0 if unknown.
    """

    name: str
    gib: float
    tflops: float

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.gib * 2**30)


GPUS = {gpu.name: gpu for gpu in (
    GpuSpec('t4', 15.0, 65), GpuSpec('v100-16gb', 16.0, 125), GpuSpec('l4', 22.5, 121),
    GpuSpec('a10', 22.5, 125), GpuSpec('rtx3090', 24.0, 71), GpuSpec('rtx4090', 24.0, 165),
    GpuSpec('rtx5090', 31.8, 209), GpuSpec('v100', 32.0, 125), GpuSpec('a100-40gb', 40.0, 312),
    GpuSpec('l40s', 45.0, 362), GpuSpec('a6000', 48.0, 155), GpuSpec('h100', 79.6, 989),
    GpuSpec('a100', 80.0, 312), GpuSpec('h200', 140.4, 989),
)}  # fmt: skip


def find_gpu(name: str) -> GpuSpec:
    """Looks up a GPU by name, such as 'h100' or 'RTX 4090'.

    Raises:
        UsageError: The GPU is not in the table; lists the known ones.
    """
    key = name.lower().replace(' ', '').removeprefix('nvidia')
    if key not in GPUS:
        raise UsageError(f'unknown GPU {name!r}; known: {", ".join(GPUS)}{nearest(key, GPUS)}')
    return GPUS[key]


def local_gpu() -> GpuSpec | None:
    """The GPU of this machine, None if there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = properties.name.lower().replace(' ', '')
    key = max((key for key in GPUS if key.split('-')[0] in name), key=len, default=None)
    return GpuSpec(properties.name, properties.total_memory / 2**30, GPUS[key].tflops if key else 0)


def flops_per_token(setup: Setup) -> float:
    """Floating point operations to train on one token.

    A frozen weight: 2 forward, 2 for the gradient of its input; if the layer is recomputed, 2 more, except for down. A
    trained one 2 further. The head forward and backward at targets only. Causal attention over rows of S tokens: S A
    products for the scores and the same for the values, once forward and 2.5 times backward.
    """
    dims = setup.dims
    down = dims.num_layers * dims.hidden * dims.inner
    recomputed = setup.recomputed_layers / dims.num_layers
    weights = 4 * dims.num_linear + 2 * recomputed * (dims.num_linear - (down if setup.on_fast_path else 0))
    head = 4 * dims.hidden * dims.vocabulary * setup.target_share
    trained = (2 if setup.full else 6) * dims.num_trained
    attention = (3.5 + recomputed) * dims.num_layers * 2 * setup.longest * dims.heads * dims.head_size
    return weights + head + trained + attention


def tokens_per_second(setup: Setup, gpu: GpuSpec) -> float:
    """Estimated training throughput of one GPU."""
    size = 'large' if setup.tokens > MAX_GRAPH_TOKENS else 'small'
    utilization = _UTILIZATION[size if setup.on_fast_path else 'stock']
    return gpu.tflops * 1e12 * utilization / flops_per_token(setup)
