"""What the fork server imports: all that a training imports, and nothing run."""

import importlib
import os

os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'

for name in ('bitsandbytes', 'peft', 'xtuner.cli.train', 'xtuner.engine.run', 'xtuner.engine.distributed.fsdp'):
    importlib.import_module(name)
