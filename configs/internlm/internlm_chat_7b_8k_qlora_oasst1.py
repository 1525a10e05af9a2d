# InternLM-Chat-7B in 4 bits, fine-tuned on OpenAssistant conversations.
from mmengine.config import read_base

with read_base():
    from .._base_.models.internlm_chat_7b_8k import *
    from .._base_.methods.qlora import *
    from .._base_.datasets.oasst1 import *
    from .._base_.schedules.adapter_3e import *
    from .._base_.runtime.default import *
