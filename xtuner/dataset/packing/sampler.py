"""The order of an epoch: a pure function of seed and epoch, so that a resumed run reads on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Yields the indices of one epoch, shuffled by `(seed, epoch)`.

    Ranks take turns in one common order, so that step for step they see together what one rank with a larger batch
    would see. Where the items do not divide evenly, the order is filled up from its beginning: ranks stay in step and
    nothing is left out, and at most `world_size - 1` items come twice.

    Args:
        num_items: Items of the data set.
        seed: Seed of the order.
        shuffle: Whether to shuffle at all.
        rank: This process, from 0.
        world_size: Processes that share the data.
        lengths: Tokens of each item, where they are known. The longest changes places with the first of the first
            epoch: if memory does not suffice, that shows at once and not after hours.

    Example: 5 items, unshuffled, 2 ranks: rank 0 yields 0, 2, 4 and rank 1 yields 1, 3, 0.
    """

    def __init__(
        self,
        num_items: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Chooses the epoch to iterate, and how many of this rank's items to leave out at its beginning."""
        self.epoch = epoch
        self.skip = skip

    def order(self) -> np.ndarray:
        """Returns the whole epoch's order over all ranks, int64 `(num_items,)`, before it is shared out."""
        if not self.shuffle:
            return np.arange(self.num_items)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items)
        if self.lengths is not None and self.epoch == 0:
            place = int(np.argmax(self.lengths[order]))
            order[[0, place]] = order[[place, 0]]
        return order

    def __iter__(self) -> Iterator[int]:
        order = np.resize(self.order(), len(self) * self.world_size)
        yield from order[self.rank :: self.world_size][self.skip :].tolist()

    def __len__(self) -> int:
        """Items of a whole epoch on this rank, whatever is skipped."""
        return -(-self.num_items // self.world_size)


class LengthGroupedEpochSampler(EpochSampler):
    """Like `EpochSampler`, with items of similar length in a batch, so that little is padded.

    The shuffled order is cut into stretches of `batches_in_group` batches (over all ranks), each sorted by length and
    cut into batches, and the batches are shuffled. The longest comes first: if it fits into memory, so do the others.

    Args:
        lengths: Tokens of each item.
        batch_size: Items of a rank's micro-batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle before grouping.
        rank: This process, from 0.
        world_size: Processes that share the data.
        batches_in_group: Batches a stretch: more pads less and mixes less.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        batches_in_group: int = 50,
    ) -> None:
        super().__init__(len(lengths), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        self.item_lengths = np.asarray(lengths)
        self.batch = batch_size * world_size
        self.group = self.batch * batches_in_group

    def order(self) -> np.ndarray:
        """Returns the whole epoch's order over all ranks, int64 `(num_items,)`."""
        order = super().order()
        groups = np.arange(len(order)) // self.group
        order = order[np.lexsort((-self.item_lengths[order], groups))]  # within each group, the longest first
        # A last batch that is not full stays last, so that all batches before it stay whole on every rank.
        num_batches = len(order) // self.batch
        if not num_batches:
            return order
        batches, last = order[: num_batches * self.batch].reshape(num_batches, -1), order[num_batches * self.batch :]
        places = np.random.default_rng([self.seed, self.epoch, 1]).permutation(num_batches)
        longest = np.argmax(self.item_lengths[batches[:, 0]])
        places = np.concatenate([[longest], places[places != longest]])
        return np.concatenate([batches[places].reshape(-1), last])
