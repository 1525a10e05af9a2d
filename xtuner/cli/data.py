"""Loading shared by the data commands: the config, its tokenizer and its template, but no model."""

from __future__ import annotations

import argparse
from typing import Any

from xtuner.cli.early import check_config
from xtuner.cli.options import read_config


def load_data_config(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Returns the checked config of a command line, its tokenizer and its template; loads no model."""
    from xtuner.cli.log import start_logging

    config = read_config(args)
    start_logging()
    check_config(config)

    from xtuner.dataset.templates.builtin import get_template
    from xtuner.engine.packing import with_supported_packing
    from xtuner.model.loading import load_config, load_tokenizer, resolve_model

    model = config.model
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    folder = resolve_model(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, weights=False
    )
    if (folder / 'config.json').exists():  # a tokenizer is enough to prepare data
        config = with_supported_packing(config, load_config(folder, trust_remote_code=model.trust_remote_code))
    return config, tokenizer, get_template(model.template, tokenizer)
