# InternLM-7B in 4 bits, fine-tuned on Alpaca instructions.
from mmengine.config import read_base

with read_base():
    from .._base_.models.internlm_7b import *
    from .._base_.methods.qlora import *
    from .._base_.datasets.alpaca import *
    from .._base_.schedules.adapter_3e import *
    from .._base_.runtime.default import *
