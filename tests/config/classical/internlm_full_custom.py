# A config in the classical form: all weights, a file of one's own, no packing.
import torch
from datasets import load_dataset
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import CosineAnnealingLR, OptimWrapper
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import template_map_fn_factory
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

path = 'internlm/internlm-7b'
data_files = ['conversations.json']
batch_size = 2
max_iters = 300

tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path, padding_side='right')
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=path, torch_dtype=torch.float32),
)
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path='json', data_files=dict(train=data_files)),
    tokenizer=tokenizer,
    max_length=512,
    dataset_map_fn=None,
    template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.internlm_chat),
    pack_to_max_length=False,
)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=train_dataset,
    sampler=dict(type=LengthGroupedSampler, length_property='length', per_device_batch_size=batch_size),
    collate_fn=dict(type=default_collate_fn),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=2e-5), clip_grad=None)
param_scheduler = dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, T_max=max_iters)
train_cfg = dict(type=TrainLoop, max_iters=max_iters)
custom_hooks = [dict(type=DatasetInfoHook, tokenizer=tokenizer)]
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=10), checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=100)
)
