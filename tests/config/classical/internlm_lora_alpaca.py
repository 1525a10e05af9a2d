# A config in the classical form: LoRA in bf16 on two data sets, packs of samples that are kept apart.
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from mmengine.visualization import TensorboardVisBackend, Visualizer
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import alpaca_map_fn, alpaca_zh_map_fn, template_map_fn_factory
from xtuner.engine.hooks import (
    DatasetInfoHook,
    EvaluateChatHook,
    HFCheckpointHook,
    ThroughputHook,
    VarlenAttnArgsToMessageHubHook,
)
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

path = 'internlm/internlm-7b'
use_varlen_attn = True
alpaca_path = 'tatsu-lab/alpaca'
alpaca_zh_path = 'silk-road/alpaca-data-gpt4-chinese'
prompt_template = PROMPT_TEMPLATE.internlm_chat
max_length = 2048
accumulative_counts = 4
max_epochs = 1
lr = 1e-4
warmup_ratio = 0.05

tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path, trust_remote_code=True, padding_side='right'
)
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=path,
        trust_remote_code=True,
        torch_dtype=torch.bfloat16,
    ),
    lora=dict(type=LoraConfig, r=8, lora_alpha=16, lora_dropout=0.05, target_modules=['q_proj', 'v_proj']),
)

alpaca_en = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=alpaca_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    pack_to_max_length=True,
    use_varlen_attn=use_varlen_attn,
)
alpaca_zh = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=alpaca_zh_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=alpaca_zh_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    pack_to_max_length=True,
    use_varlen_attn=use_varlen_attn,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=ConcatDataset, datasets=[alpaca_en, alpaca_zh]),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn, use_varlen_attn=use_varlen_attn),
)

optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    clip_grad=dict(max_norm=0.5, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale='dynamic',
    dtype='bfloat16',
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs,
         convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=lr * 0.1, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs,
         convert_to_iter_based=True),
]  # fmt: skip
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        every_n_iters=100,
        evaluation_inputs=['Name a colour.'],
        system='',
        prompt_template=prompt_template,
        max_new_tokens=4,
    ),
    dict(type=ThroughputHook),
    dict(type=HFCheckpointHook),
    dict(type=VarlenAttnArgsToMessageHubHook),
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=-1, max_keep_ckpts=-1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
randomness = dict(seed=7, deterministic=False)
