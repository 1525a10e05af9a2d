"""Models: configs, tokenizers, weights, quantisation and the families of models."""

from __future__ import annotations

import logging

from xtuner.aliases import former_names

# As it is imported, bitsandbytes advises to install a package for a layout of 4-bit weights that is never used here
# (`quantization.keep_plain_layout`).
logging.getLogger('bitsandbytes.backends.cpu.ops').addFilter(
    lambda record: 'pip install kernels' not in str(record.msg)
)

__getattr__ = former_names(__name__)
