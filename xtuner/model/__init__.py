"""Models: configs, tokenizers, weights, quantization and model families."""

from __future__ import annotations

import logging

from xtuner.aliases import former_names

# On import, bitsandbytes recommends a package for a 4-bit weight layout that is never used here
# (`quantization.keep_plain_layout`).
logging.getLogger('bitsandbytes.backends.cpu.ops').addFilter(
    lambda record: 'pip install kernels' not in str(record.msg)
)

__getattr__ = former_names(__name__)
