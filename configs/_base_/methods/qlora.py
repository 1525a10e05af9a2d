# QLoRA (arXiv:2305.14314): LoRA on a frozen base in 4 bits.
from mmengine.config import read_base

with read_base():
    from .lora import *

quantization = dict(bits=4, quant_type='nf4', double_quant=True)
