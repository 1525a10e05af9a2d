# InternLM-Chat-7B in half precision with LoRA, fine-tuned on OpenAssistant conversations.
from mmengine.config import read_base

with read_base():
    from .._base_.models.internlm_chat_7b import *
    from .._base_.methods.lora import *
    from .._base_.datasets.oasst1 import *
    from .._base_.schedules.adapter_3e import *
    from .._base_.runtime.default import *
