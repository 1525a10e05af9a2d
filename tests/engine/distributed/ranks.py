"""What each rank of the strategy tests computes: one optimizer step of the real loop, by every strategy, over gloo.

Forked from a server that has imported everything. Rank 0 leaves what it found in a file, for the test to compare.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from tests.faults.lives import CONTEXT
from tests.model.published import write_model
from xtuner.adapters.attach import attach_adapter, trainable_parameters
from xtuner.config.schema import QuantizationConfig, ScheduleConfig
from xtuner.dataset.packing.collate import collate
from xtuner.dataset.packing.sampler import EpochSampler
from xtuner.engine.distributed.base import Single, Strategy
from xtuner.engine.distributed.fsdp import FullyShard
from xtuner.engine.distributed.launch import process_group, sequence_group
from xtuner.engine.runner import Runner
from xtuner.engine.schedule import StepSampler, TrainingSchedule
from xtuner.fused.enable import enable_fused_training
from xtuner.kernels.quantized import quant_state_of
from xtuner.model.families.internlm2.configuration import InternLM2Config
from xtuner.model.families.internlm2.modeling import InternLM2ForCausalLM
from xtuner.model.loading import load_model
from xtuner.model.sharded_loading import ShardSpec
from xtuner.objectives.base import Objective
from xtuner.objectives.model import TrainingModel
from xtuner.objectives.sft import Sft, SupervisedFinetune

NUM_ITEMS, VOCABULARY = 8, 61


@dataclass(frozen=True)
class Case:
    """One way to compute the same step of `NUM_ITEMS` items.

    Attributes:
        strategy: 'single', 'ddp' or 'fsdp'.
        method: 'lora', 'qlora' or 'full' on Llama; 'internlm2': QLoRA on fused qkv projections, by key head.
        batch_size: Items of a micro-batch.
        sequence: Ranks that share a pack.
        objective: What is trained for.
    """

    strategy: str
    method: str
    batch_size: int = 1
    sequence: int = 1
    objective: type[Objective] = Sft

    @property
    def name(self) -> str:
        """A name for a folder."""
        return f'{self.strategy}-{self.method}-{self.batch_size}-{self.sequence}-{self.objective.name}'


def cases(world_size: int) -> list[Case]:
    """All of them for a number of ranks; gradients are accumulated over what is left of the items."""
    found = [
        Case(strategy, method, batch_size)
        for strategy in ('ddp', 'fsdp')
        for method in ('lora', 'qlora', 'full')
        for batch_size in (1, 2)
    ]
    shared = [Case('ddp', 'lora', sequence=size) for size in (2, 4) if size <= world_size]
    fused_qkv = [Case('ddp', 'internlm2'), Case('fsdp', 'internlm2'), Case('ddp', 'internlm2', sequence=2)]
    return [*found, *shared, Case('fsdp', 'qlora', sequence=2), *fused_qkv]


def items() -> list[dict[str, np.ndarray]]:
    """Packs of one to four samples, of 3 to 40 tokens, part of them targets: none is like another."""
    random = np.random.default_rng(0)
    made = []
    for number in range(NUM_ITEMS):
        lengths = random.integers(3, 11, number % 4 + 1)
        ids = random.integers(0, VOCABULARY, lengths.sum())
        labels = np.where(random.random(len(ids)) < 0.6, ids, -100)
        positions = np.concatenate([np.arange(length) for length in lengths])
        labels[positions == 0], labels[-1] = -100, ids[-1]
        made.append({'input_ids': ids, 'labels': labels, 'position_ids': positions})
    return made


def model_of(
    method: str,
    dtype: torch.dtype = torch.float32,
    *,
    fast: bool = True,
    sharded: bool = False,
    objective: type[Objective] = Sft,
) -> Any:
    """The same small model for the same method, adapters not zero."""
    torch.manual_seed(0)
    sizes = {'vocab_size': VOCABULARY, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
             'num_attention_heads': 4, 'initializer_range': 0.2}  # fmt: skip
    if method == 'internlm2':
        llm: Any = InternLM2ForCausalLM(InternLM2Config(**sizes, num_key_value_heads=2, bias=False))
    else:
        llm = LlamaForCausalLM(LlamaConfig(**sizes))
    if method in ('qlora', 'internlm2'):
        quantise(llm, torch.float32 if sharded else torch.uint8)
    if method != 'full':
        adapter = LoraConfig(r=3, lora_alpha=6, target_modules='all-linear', task_type='CAUSAL_LM')
        llm = get_peft_model(llm.requires_grad_(False), adapter)
        for name, parameter in llm.named_parameters():
            if 'lora_B' in name:
                parameter.data.normal_(0, 0.2)
    llm = llm.to(dtype)
    if fast:
        enable_fused_training(llm, sharded=sharded)
    return TrainingModel(llm, objective()).train()


def quantise(llm: Any, storage: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in llm.model.layers:
        for parent in layer.children():
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    new = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32,
                                     quant_type='nf4', quant_storage=storage)  # fmt: skip
                    new.weight = Params4bit(
                        linear.weight.data, requires_grad=False, quant_type='nf4', quant_storage=storage
                    )
                    setattr(parent, name, new.to('cpu'))


def make(case: Case, rank: int, world_size: int) -> Strategy:
    from xtuner.engine.distributed.ddp import DataParallel

    kinds = {'single': Single, 'ddp': DataParallel, 'fsdp': FullyShard}
    return kinds[case.strategy](rank, world_size)


def one_step(case: Case, rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Loss, norm, gradient and new weights of one step of the real loop; also the optimizer's whole state."""
    model = model_of(case.method, sharded=case.strategy == 'fsdp', objective=case.objective)
    if case.sequence > 1:
        model.share_sequences(sequence_group(case.sequence))
    strategy = make(case, rank, world_size)
    sent = count_broadcasts() if case.strategy == 'ddp' else None
    strategy.prepare(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    groups = world_size // case.sequence
    held = held_bytes(model.llm)
    schedule = ScheduleConfig(max_steps=1, batch_size=case.batch_size, max_norm=0.5, warmup_ratio=0.0,
                              accumulative_counts=NUM_ITEMS // groups // case.batch_size)  # fmt: skip
    plan = TrainingSchedule(NUM_ITEMS, schedule, groups)
    sampler = StepSampler(EpochSampler(NUM_ITEMS, seed=3), plan, rank=rank // case.sequence)
    loader = DataLoader(items(), batch_sampler=sampler, collate_fn=lambda batch: collate(batch, pad_id=0))
    runner = Runner(strategy, loader, hooks=[], work_dir=folder / f'{case.name}-{rank}', seed=0, trackers=[],
                    launcher='none', write_model=lambda to, weights: None)  # fmt: skip
    runner.set_loop(plan=plan, compute_dtype=torch.float32, seed=5, max_nonfinite_steps=3)
    found: dict[str, Any] = {'held': held}
    note_gradient(strategy, found)
    note_result(runner, found)
    runner.train()
    found['weights'] = strategy.weights() or {n.removeprefix('llm.'): p.detach().clone()
                                              for n, p in trainable_parameters(model).items()}  # fmt: skip
    found['optimizer'] = strategy.optimizer_state()
    found['broadcast'] = sent() if sent else None
    from_disk = [found['optimizer']]  # every rank reads what rank 0 wrote
    if world_size > 1:
        distributed.broadcast_object_list(from_disk, src=0)
    strategy.load_optimizer_state(from_disk[0])
    found['again'] = strategy.optimizer_state()
    return found


def held_bytes(llm: Any) -> int:
    """Memory behind the base's weights in the layers, and behind the scales of 4-bit ones, on this rank."""
    base = llm.get_base_model() if hasattr(llm, 'get_base_model') else llm
    named = base.model.layers.named_parameters()
    tensors = [getattr(p, '_local_tensor', p) for name, p in named if 'lora_' not in name]
    states = (quant_state_of(module) for module in base.model.layers.modules())
    tensors += [state.absmax for state in states if state is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def cut_and_whole(rank: int, world_size: int, folder: Path) -> list[str]:
    """What differs after a model was cut while it was loaded from one that was loaded whole and then sharded."""
    different = []
    for method, quantization in (('full', None), ('lora', None), ('qlora', QuantizationConfig())):
        sides = []
        for share in (None, ShardSpec(rank, world_size)):
            llm: Any = load_model(folder, dtype=torch.float32, quantization=quantization, sharded=True, share=share)
            if method == 'full':
                llm.requires_grad_(True)
            else:
                torch.manual_seed(0)
                llm = attach_adapter(llm, {'type': LoraConfig, 'r': 3, 'target_modules': 'all-linear',
                                           'modules_to_save': ['lm_head'], 'init_lora_weights': False})  # fmt: skip
            enable_fused_training(llm, sharded=True)
            model: Any = FullyShard(rank, world_size).wrap(SupervisedFinetune(llm).train())
            batch = collate(items(), pad_id=0)
            sides.append((model, model(**batch).detach()))
        (one_model, loss), (cut_model, own_loss) = sides
        if not torch.equal(loss, own_loss):
            different.append(f'{method}: loss')
        for (name, one), (_, other) in zip(one_model.named_parameters(), cut_model.named_parameters(), strict=True):
            same = one.requires_grad == other.requires_grad and torch.equal(bits(one), bits(other))
            different += [] if same else [f'{method}: {name}']
    return different


def note_gradient(strategy: Strategy, found: dict[str, Any]) -> None:
    """Keeps the unclipped gradient, whole, as the strategy completes it."""
    backward = strategy.clip

    def clip(scaler: Any, max_norm: float) -> float:
        found['gradient'] = {n.removeprefix('llm.'): whole(p.grad) for n, p in
                             trainable_parameters(strategy.bare).items()}  # fmt: skip
        return backward(scaler, max_norm)

    strategy.clip = clip  # type: ignore[method-assign]


def note_result(runner: Runner, found: dict[str, Any]) -> None:
    from mmengine.hooks import Hook

    class Note(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            found.update(outputs)

    runner.register_hook(Note())


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().clone()


def bits(tensor: Any) -> torch.Tensor:
    return whole(tensor).contiguous().view(torch.uint8)


def count_broadcasts() -> Any:
    """Elements that DDP sends when it is made."""
    sizes: list[int] = []
    original = distributed._broadcast_coalesced

    def counted(group: Any, tensors: Any, *args: Any) -> None:
        sizes.extend(t.numel() for t in tensors)
        original(group, tensors, *args)

    distributed._broadcast_coalesced = counted

    def stop() -> int:
        distributed._broadcast_coalesced = original
        return sum(sizes)

    return stop


def work(rank: int, world_size: int, port: int, folder: str, chosen: list[Case] | None) -> None:
    """A rank's whole life: the chosen cases, or all of them and the models cut while they are loaded."""
    torch.set_num_threads(1)
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size),
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}  # fmt: skip
    with process_group('pytorch', timeout_s=60):
        if chosen is None:
            cut = cut_and_whole(rank, world_size, Path(folder) / 'model')
            if rank == 0:
                torch.save(cut, Path(folder) / 'cut.pt')
        for number, case in enumerate(chosen or cases(world_size)):
            found = one_step(case, rank, world_size, Path(folder))
            if rank == 0:
                torch.save(found, Path(folder) / f'{number}.pt')
            distributed.barrier()


def run_ranks(world_size: int, folder: Path, chosen: list[Case] | None = None) -> dict[Case, dict[str, Any]]:
    """The chosen cases, or all of them, on so many ranks; what rank 0 found of each."""
    write_model(folder / 'model', 'v1')
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    processes = [
        CONTEXT.Process(target=work, args=(rank, world_size, port, str(folder), chosen)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size
    return {
        case: torch.load(folder / f'{n}.pt', weights_only=False) for n, case in enumerate(chosen or cases(world_size))
    }


def alone(method: str, folder: Path, objective: type[Objective] = Sft) -> dict[str, Any]:
    """The same step by one process, all items in one batch."""
    return one_step(Case('single', method, batch_size=NUM_ITEMS, objective=objective), 0, 1, folder)
