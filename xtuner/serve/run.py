"""From the command line's words to a running service."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xtuner.model.batching import BatchDecoder
from xtuner.model.generate import Sampling
from xtuner.model.kept import keep_weights
from xtuner.serve.app import Limits, Service
from xtuner.serve.guard import Guard
from xtuner.serve.models import load_served
from xtuner.serve.server import listen, serve

logger = logging.getLogger('xtuner')


def run_service(
    llm: str,
    *,
    adapters: Sequence[str],
    template: str | None,
    bits: int | None,
    packed: bool,
    trust_remote_code: bool,
    sampling: Sampling,
    host: str,
    port: int,
    loopback: bool,
    api_key: str,
    num_streams: int,
    num_waiting: int,
    max_length: int,
    body_bytes: int,
    grace_s: float,
) -> None:
    """Takes the address, loads the model, serves until a signal comes.

    Args:
        llm: A model's folder or hub id.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template; None takes the one each model was tuned with.
        bits: 4 or 8 quantises the base; None leaves it as the adapters were trained.
        packed: Leave 4-bit weights packed even where there is room to keep them as floats.
        trust_remote_code: Whether code in the model's folder may run.
        sampling: What holds where a request says nothing.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        loopback: Whether that address is reached from this machine alone.
        api_key: What clients must show; '' for nothing.
        num_streams: Answers drawn at a time.
        num_waiting: Answers that may wait.
        max_length: Tokens of prompt and answer, at most the model's own limit.
        body_bytes: Size of a request.
        grace_s: Seconds that answers have to end.

    Raises:
        UsageError: the address cannot be had, or two models have one name.
        ModelError: the model cannot be loaded or served.
        CheckpointError: an adapter is of another base, or none.
    """
    taken = listen(host, port)
    if not loopback:
        guard = 'whoever reaches it and knows the API key' if api_key else 'WITHOUT AN API KEY, so whoever reaches it'
        logger.warning('listening at %s, not on this machine alone, %s can use it; the traffic is not encrypted',
                       host, guard)  # fmt: skip
    loaded = load_served(llm, adapters=adapters, template=template, bits=bits, trust_remote_code=trust_remote_code)
    max_length = min(max_length, loaded.max_length)
    decoder = BatchDecoder(loaded.model, num_rows=num_streams, max_length=max_length)
    service = Service(
        loaded,
        decoder,
        limits=Limits(max_length, body_bytes, waiting=num_waiting),
        sampling=sampling,
        guard=Guard(api_key=api_key, only_loopback=loopback and not api_key),
    )
    if not packed and (kept := keep_weights(loaded.model)).num_layers:
        logger.info('%d of %d layers kept in the form that is multiplied soonest: %.2f GiB', kept.num_kept,
                    kept.num_layers, kept.num_bytes / 2**30)  # fmt: skip
    logger.info('%d answers of up to %d tokens at a time: %.2f GiB', num_streams, max_length,
                decoder.store_bytes / 2**30)  # fmt: skip
    for model in loaded.served:
        logger.info('model %r%s', model.name, '' if model.template else ' (no prompt format: completions only)')
    serve(service.app(), taken, grace_s=grace_s)
