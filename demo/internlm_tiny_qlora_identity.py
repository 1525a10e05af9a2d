# Second part of the demo: QLoRA in 4 bits on the base model of the first part, which learns a name and a few facts.
# CPU, 2 cores: about 1 minute; the loss falls from 4 to 0.2.
from mmengine.config import read_base
from torch.optim import AdamW

with read_base():
    from ..configs._base_.methods.qlora import *
    from ..configs._base_.schedules.adapter_3e import *
    from ..configs._base_.runtime.default import *

model = dict(path='work_dirs/demo/base', template='internlm_chat')
dataset = dict(source='demo/identity.jsonl', map_fn='openai', max_length=512)
optimizer.update(type=AdamW, lr=3e-3)
adapter.update(lora_alpha=64, lora_dropout=0.05)
schedule.update(max_epochs=30, batch_size=2, accumulative_counts=1)
runtime.update(activation_checkpointing=False)
checkpoint.update(interval=1000, max_keep=1)
log.update(interval=10)
samples.update(prompts=['What is your name?', '你叫什么名字？'], interval=1000, max_new_tokens=30)
