# Three epochs at a tenth of the learning rate for adapters, because all weights are trained.
from mmengine.config import read_base

with read_base():
    from .adapter_3e import *

optimizer.update(lr=2e-5)
