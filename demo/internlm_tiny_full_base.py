# First part of the demo: full training of a tiny InternLM from scratch on a few hundred short conversations.
# CPU, 2 cores: a bit more than a minute; the loss falls from 7.6 to 0.1.
from mmengine.config import read_base
from torch.optim import AdamW

with read_base():
    from ..configs._base_.methods.full import *
    from ..configs._base_.schedules.full_3e import *
    from ..configs._base_.runtime.default import *

model = dict(path='work_dirs/demo/fresh', template='internlm_chat')
dataset = dict(source='demo/base.jsonl', map_fn='openai', max_length=512)
optimizer.update(type=AdamW, lr=7e-4, betas=(0.9, 0.95), weight_decay=0.01)
schedule.update(max_epochs=22, batch_size=2, accumulative_counts=1)
runtime.update(activation_checkpointing=False)
checkpoint.update(interval=1000, max_keep=1)
log.update(interval=10)
samples.update(prompts=['What is the capital of France?', '天空是什么颜色？'], interval=1000, max_new_tokens=30)
