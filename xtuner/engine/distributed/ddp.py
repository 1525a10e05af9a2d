"""A copy of the model on every rank; gradients are added up while the backward pass still runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from xtuner.engine.distributed.base import Strategy

# An adapter of rank 64 on InternLM-7B is 640 MB: two messages, the first of which goes while earlier layers are
# computed. A message slows the products beside it, so that on cards with a direct link five were slower than two.
_BUCKET_MB = 320


class DataParallel(Strategy):
    """Torch's `DistributedDataParallel` over the trained parameters alone; what is frozen is never sent."""

    name = 'ddp'

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.gradient_factor = float(world_size)  # DDP averages

    def wrap(self, model: nn.Module) -> nn.Module:
        """All ranks begin with rank 0's trained parameters."""
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
        # Without `device_ids` the batch stays on the host, where the model reads it before it moves it.
        return DistributedDataParallel(model, bucket_cap_mb=_BUCKET_MB, gradient_as_bucket_view=True)

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are added up in the last micro-batch's backward pass only."""
        return nullcontext() if last else self.module.no_sync()

    def on_reduce(self, call: Any) -> None:
        """Calls `call()` whenever a bucket of gradients is ready on this rank."""

        def reduce(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            """Adds a bucket up over the ranks; its mean, when that is done."""
            call()
            # The sum first, then the mean, as DDP does without a hook.
            work = distributed.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda future: future.value()[0].div_(self.world_size))

        self.module.register_comm_hook(None, lambda state, bucket: reduce(bucket))
