# Three epochs at a tenth of the adapters' learning rate: all weights move.
from mmengine.config import read_base

with read_base():
    from .adapter_3e import *

optimizer.update(lr=2e-5)
