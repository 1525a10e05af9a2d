"""Hooks of the training loop, one class per file."""

from xtuner.engine.hooks.checkpoint import CheckpointHook
from xtuner.engine.hooks.classical import HFCheckpointHook, ThroughputHook, VarlenAttnArgsToMessageHubHook
from xtuner.engine.hooks.dataset_info import DatasetInfoHook
from xtuner.engine.hooks.evaluate_chat import EvaluateChatHook
from xtuner.engine.hooks.log import LogHook
from xtuner.engine.hooks.validate import ValidateHook

__all__ = [
    'CheckpointHook',
    'DatasetInfoHook',
    'EvaluateChatHook',
    'HFCheckpointHook',
    'LogHook',
    'ThroughputHook',
    'ValidateHook',
    'VarlenAttnArgsToMessageHubHook',
]
