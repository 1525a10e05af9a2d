# `make demo-real`: QLoRA in 4 bits teaches a real model of 135 million parameters a new identity.
# CPU, 2 cores: a few minutes; the loss falls from 4.5 to below 1.
from mmengine.config import read_base
from torch.optim import AdamW

with read_base():
    from ..configs._base_.methods.qlora import *
    from ..configs._base_.schedules.adapter_3e import *
    from ..configs._base_.runtime.default import *

model = dict(path='work_dirs/real/model')  # the prompt format is that of its tokenizer
dataset = dict(source='demo/identity.jsonl', map_fn='openai', max_length=256)
optimizer.update(type=AdamW, lr=1e-3)
adapter.update(r=16, lora_alpha=32)
schedule.update(max_epochs=5, accumulative_counts=2)
checkpoint.update(interval=1000, max_keep=1)
log.update(interval=5)
samples.update(prompts=['What is your name?', 'What is the capital of France?'], interval=1000, max_new_tokens=40)
