# InternLM-7B, full fine-tuning on OpenAssistant conversations.
from mmengine.config import read_base

with read_base():
    from .._base_.models.internlm_7b import *
    from .._base_.methods.full import *
    from .._base_.datasets.oasst1 import *
    from .._base_.schedules.full_3e import *
    from .._base_.runtime.default import *
