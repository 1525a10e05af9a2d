"""Predicts memory by component, steps, tokens, disk space and hours of a run, without weights or a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from xtuner.cli.early import check_config, check_objective
from xtuner.cli.options import add_config_arguments, positive_float, positive_int, read_config
from xtuner.utils.escape import printable

if TYPE_CHECKING:
    from xtuner.engine.estimate import DataSize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        '--gpu', metavar='GPU', help='a GPU model such as h100 or rtx4090 (default: the GPU of this machine)'
    )
    parser.add_argument(
        '--num-gpus', type=positive_int, default=1, help='number of GPUs for data parallel training (default: 1)'
    )
    parser.add_argument(
        '--step-seconds', type=positive_float, help='measured time of one step, to predict the hours from'
    )
    parser.add_argument(
        '--no-data', action='store_true', help='do not prepare the data; predict memory for full rows only'
    )
    parser.add_argument('--json', action='store_true', help='print the estimate as JSON')


def run(args: argparse.Namespace) -> int:
    """Prints the estimate to stdout."""
    from xtuner.cli.log import start_logging

    config = read_config(args)
    start_logging()
    check_config(config, data=False)  # memory is estimated even without the data
    check_objective(config)

    from xtuner.engine.estimate import estimate
    from xtuner.engine.estimate_text import describe
    from xtuner.engine.packing import with_supported_packing
    from xtuner.memory.gpus import find_gpu, local_gpu
    from xtuner.model.hub import resolve_model
    from xtuner.model.load_config import load_config

    card = find_gpu(args.gpu) if args.gpu else local_gpu()
    model = config.model
    folder = resolve_model(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, weights=False
    )
    config = with_supported_packing(config, load_config(folder, trust_remote_code=model.trust_remote_code))
    data = None if args.no_data else _size_of_data(config, folder)
    free = card.num_bytes if card else None
    result = estimate(config, folder, data=data, world_size=args.num_gpus, free=free)
    if args.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        lines = describe(config, result, card=card, step_seconds=args.step_seconds)
        print(printable('\n'.join(lines)))
    return 0


def _size_of_data(config: Any, folder: Any) -> DataSize | None:
    """Prepares the data or loads it from the cache; None, with a message, if that fails."""
    from xtuner.dataset.prepare import prepare_dataset
    from xtuner.dataset.templates.builtin import get_template
    from xtuner.engine.estimate import data_size
    from xtuner.errors import XTunerError
    from xtuner.model.loading import load_tokenizer

    if config.dataset.streaming:
        return None
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
        template = get_template(config.model.template, tokenizer)
        return data_size(prepare_dataset(config.dataset, tokenizer=tokenizer, template=template))
    except XTunerError as error:
        print(printable(f'the size of the data is unknown: {error}'), file=sys.stderr)
        return None
