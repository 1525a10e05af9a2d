"""Data parallelism: a full model on every rank; gradients are reduced during the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from xtuner.engine.distributed.base import Strategy

# An adapter of rank 64 on InternLM-7B is 640 MB: two buckets, the first of which is sent while earlier layers are
# computed. Communication slows concurrent products: on GPUs with a direct link five buckets were slower than two.
_BUCKET_MB = 320


class DataParallel(Strategy):
    """Torch's `DistributedDataParallel` over trained parameters only; frozen ones are never sent."""

    name = 'ddp'

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.gradient_factor = float(world_size)  # DDP averages

    def wrap(self, model: nn.Module) -> nn.Module:
        """Broadcasts rank 0's trained parameters."""
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
        # Without `device_ids` the batch stays on the host, where the model reads it before moving it.
        return DistributedDataParallel(model, bucket_cap_mb=_BUCKET_MB, gradient_as_bucket_view=True)

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced only in the last micro-batch's backward pass."""
        return nullcontext() if last else self.module.no_sync()

    def on_reduce(self, call: Any) -> None:
        """Calls `call()` whenever a bucket of gradients is ready on this rank."""

        def reduce(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            """Sums a bucket over the ranks; returns a future of its mean."""
            call()
            # Sum first, then divide, as DDP does without a hook.
            work = distributed.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda future: future.value()[0].div_(self.world_size))

        self.module.register_comm_hook(None, lambda state, bucket: reduce(bucket))
