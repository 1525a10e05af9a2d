"""From the command line's words to a running service."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xtuner.chat.base import AS_TRAINED, BaseChoice
from xtuner.chat.hosts import LOOPBACK
from xtuner.inference.batching import BatchDecoder
from xtuner.inference.generate import Sampling
from xtuner.inference.weight_cache import cache_weights
from xtuner.serve.address import Address
from xtuner.serve.app import Limits, Service
from xtuner.serve.guard import Guard
from xtuner.serve.models import Loaded, load_served
from xtuner.serve.server import serve

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class Source:
    """What is served and how it is held in memory.

    Attributes:
        llm: A model's folder or hub id.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template; None takes the one each model was tuned with.
        base: How the base is held.
        packed: Leave weights as they were loaded even where there is room for a form that is multiplied sooner.
        trust_remote_code: Whether code in the model's folder may run.
    """

    llm: str
    adapters: Sequence[str] = ()
    template: str | None = None
    base: BaseChoice = AS_TRAINED
    packed: bool = False
    trust_remote_code: bool = False


def run_service(
    source: Source,
    address: Address,
    taken: Sequence[socket.socket],
    limits: Limits,
    *,
    sampling: Sampling,
    grace_s: float,
) -> None:
    """Loads the model, serves until a signal comes.

    Args:
        source: What is served.
        address: Where.
        taken: What `listen` returned for it.
        limits: What a client may take; of `max_length` at most the model's own limit is given.
        sampling: What holds where a request says nothing.
        grace_s: Seconds that answers have to end.

    Raises:
        UsageError: the address was taken meanwhile, or two models have one name.
        ModelError: the model cannot be loaded or served.
        CheckpointError: an adapter is of another base, or none.
    """
    loaded = load_served(
        source.llm, adapters=source.adapters, template=source.template, choice=source.base,
        trust_remote_code=source.trust_remote_code,
    )  # fmt: skip
    limits = replace(limits, max_length=min(limits.max_length, loaded.max_length))
    decoder = BatchDecoder(loaded.model, num_rows=limits.streams, max_length=limits.max_length)
    hosts = LOOPBACK | {address.host.lower()} if address.loopback and not address.api_key else None
    guard = Guard(api_key=address.api_key, hosts=hosts)
    service = Service(loaded, decoder, limits=limits, sampling=sampling, guard=guard)
    if not source.packed and (kept := cache_weights(loaded.model)).num_layers:
        logger.info('%d of %d layers kept in the form that is multiplied soonest: %.2f GiB', kept.num_kept,
                    kept.num_layers, kept.num_bytes / 2**30)  # fmt: skip
    _say_what_is_served(loaded, decoder)
    serve(service.app(), taken, grace_s=grace_s)


def _say_what_is_served(loaded: Loaded, decoder: BatchDecoder) -> None:
    logger.info('%d answers of up to %d tokens at a time: %.2f GiB', decoder.num_rows, decoder.max_length,
                decoder.store_bytes / 2**30)  # fmt: skip
    for model in loaded.served:
        logger.info('model %r%s', model.name, '' if model.template else ' (no prompt format: completions only)')
