"""GPUs by name, and how long a run takes on one: arithmetic over the card's peak, times the share that was measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xtuner.errors import UsageError, nearest
from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.memory.predict import Setup

# Share of the peak that a step reached on an H200 (benchmarks/qlora_step_h200_2026-11-23.md): our path with large and
# with small micro-batches, and transformers' own. On other cards it is assumed, not measured.
_REACHED = {'large': 0.55, 'small': 0.45, 'stock': 0.2}


@dataclass(frozen=True)
class GpuSpec:
    """A GPU.

    Attributes:
        name: What it is called here.
        gib: Memory that the driver lists, in GiB.
        tflops: Dense half-precision tensor peak with float32 sums, from the vendor's data sheet; 0 where not known.
    """

    name: str
    gib: float
    tflops: float

    @property
    def num_bytes(self) -> int:
        """Its memory in bytes."""
        return int(self.gib * 2**30)


GPUS = {gpu.name: gpu for gpu in (
    GpuSpec('t4', 15.0, 65), GpuSpec('v100-16gb', 16.0, 125), GpuSpec('l4', 22.5, 121),
    GpuSpec('a10', 22.5, 125), GpuSpec('rtx3090', 24.0, 71), GpuSpec('rtx4090', 24.0, 165),
    GpuSpec('rtx5090', 31.8, 209), GpuSpec('v100', 32.0, 125), GpuSpec('a100-40gb', 40.0, 312),
    GpuSpec('l40s', 45.0, 362), GpuSpec('a6000', 48.0, 155), GpuSpec('h100', 79.6, 989),
    GpuSpec('a100', 80.0, 312), GpuSpec('h200', 140.4, 989),
)}  # fmt: skip


def find_card(name: str) -> GpuSpec:
    """A card by its name, such as 'h100' or 'RTX 4090'.

    Raises:
        UsageError: it is not in the table; says which are.
    """
    key = name.lower().replace(' ', '').removeprefix('nvidia')
    if key not in GPUS:
        raise UsageError(f'no card {name!r} is known; known: {", ".join(GPUS)}{nearest(key, GPUS)}')
    return GPUS[key]


def local_card() -> GpuSpec | None:
    """The GPU of this machine, None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = properties.name.lower().replace(' ', '')
    known = max((key for key in GPUS if key.split('-')[0] in name), key=len, default=None)
    return GpuSpec(properties.name, properties.total_memory / 2**30, GPUS[known].tflops if known else 0)


def flops_per_token(setup: Setup) -> float:
    """Floating point operations that training on one token takes.

    A frozen weight: 2 forward, 2 for the gradient by its input; where the layer is computed again, 2 more, down apart.
    A trained one 2 further. The head forward and backward at targets only. Causal attention over rows of S tokens: S A
    products of a query's score and of its value, forward once and backward two and a half times.
    """
    shape = setup.shape
    down = shape.num_layers * shape.hidden * shape.inner
    again = setup.recomputed_layers / shape.num_layers
    weights = 4 * shape.num_linear + 2 * again * (shape.num_linear - (down if setup.on_fast_path else 0))
    head = 4 * shape.hidden * shape.vocabulary * setup.target_share
    trained = (2 if setup.full else 6) * shape.num_trained
    attention = (3.5 + again) * shape.num_layers * 2 * setup.longest * shape.heads * shape.head_size
    return weights + head + trained + attention


def tokens_per_second(setup: Setup, card: GpuSpec) -> float:
    """What one card will train, roughly."""
    size = 'large' if setup.tokens > MAX_GRAPH_TOKENS else 'small'
    reached = _REACHED[size if setup.on_fast_path else 'stock']
    return card.tflops * 1e12 * reached / flops_per_token(setup)
