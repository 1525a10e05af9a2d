"""Loads the models and runs the service."""

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
class ServedSource:
    """The models to serve and how to load them.

    Attributes:
        llm: Folder or hub id of the base model.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template; None uses the one each model was trained with.
        base: Precision and device of the base.
        weight_cache: Whether to cache dequantized or repacked weights if memory allows.
        trust_remote_code: Whether code in the model's folder may run.
    """

    llm: str
    adapters: Sequence[str] = ()
    template: str | None = None
    base: BaseChoice = AS_TRAINED
    weight_cache: bool = True
    trust_remote_code: bool = False


def run_service(
    source: ServedSource,
    address: Address,
    sockets: Sequence[socket.socket],
    limits: Limits,
    *,
    sampling: Sampling,
    grace_s: float,
) -> None:
    """Loads the model and serves until a signal arrives.

    Args:
        source: The models to serve.
        address: The listen address.
        sockets: The sockets that `listen` returned for it.
        limits: Limits of requests; `max_length` is reduced to the model's context length.
        sampling: Default sampling settings.
        grace_s: Seconds for running answers to finish at shutdown.

    Raises:
        UsageError: the address has been taken meanwhile, or two models have the same name.
        ModelError: the model cannot be loaded or served.
        CheckpointError: an adapter was trained on another base, or a folder contains no adapter.
    """
    loaded = load_served(
        source.llm, adapters=source.adapters, template=source.template, choice=source.base,
        trust_remote_code=source.trust_remote_code,
    )  # fmt: skip
    limits = replace(limits, max_length=min(limits.max_length, loaded.max_length))
    decoder = BatchDecoder(loaded.model, num_slots=limits.streams, max_length=limits.max_length)
    hosts = LOOPBACK | {address.host.lower()} if address.loopback and not address.api_key else None
    guard = Guard(api_key=address.api_key, hosts=hosts)
    service = Service(loaded, decoder, limits=limits, sampling=sampling, guard=guard)
    if source.weight_cache and (cached := cache_weights(loaded.model)).num_layers:
        logger.info('weight cache: %d of %d layers, %.2f GiB', cached.num_cached, cached.num_layers,
                    cached.num_bytes / 2**30)  # fmt: skip
    _log_served_models(loaded, decoder)
    serve(service.app(), sockets, grace_s=grace_s)


def _log_served_models(loaded: Loaded, decoder: BatchDecoder) -> None:
    logger.info('KV cache: %d streams of up to %d tokens, %.2f GiB', decoder.num_slots, decoder.max_length,
                decoder.cache_bytes / 2**30)  # fmt: skip
    for model in loaded.served:
        logger.info('model %r%s', model.name, '' if model.template else ' (no prompt template: completions only)')
