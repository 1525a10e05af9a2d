# LoRA (arXiv:2106.09685): a frozen base in half precision, low-rank adapters on every linear layer of the blocks.
from peft import LoraConfig

quantization = None
adapter = dict(
    type=LoraConfig,
    r=64,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules='all-linear',
    task_type='CAUSAL_LM',
)
