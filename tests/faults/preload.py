"""What the fork server imports: all that a training imports, and nothing run."""

import os

os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'
