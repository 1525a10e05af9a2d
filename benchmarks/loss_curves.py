"""Do the fused path and FP8 train like the model's own forward pass? Loss curves on real text, several seeds, one GPU.

    python benchmarks/loss_curves.py --tokenizer FOLDER --texts gsm8k_train.jsonl [--steps 200] [--seeds 3]

There are no trained weights to be had offline, so a model of InternLM's architecture (12 layers of 1024, the full
vocabulary) is first trained from scratch, whole, on one half of the texts. Then it is quantised to NF4 and rank-64
adapters are trained on the other half, `--steps` steps of two packs of 1024 tokens with dropout 0.1, once for each way
and seed; a seed sets the data's order, the adapters' start and the dropout masks, the same for all ways. The table
compares the mean loss of the last 20 steps, and the largest distance between smoothed curves, with what seeds alone do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.internlm_7b import TOKENIZER
from benchmarks.qlora_model import add_adapter
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.packing.collate import collate
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates.builtin import get_template
from xtuner.fused.enable import enable_fused_training
from xtuner.model.loading import load_tokenizer
from xtuner.objectives.sft import SupervisedFinetune

LENGTH, WINDOW = 1024, 20
WAYS = ('stock', 'ours', 'fp8')


def packs(texts: Path, tokenizer: Any, part: slice) -> Any:
    """Prepared packs of a part of the lines."""
    lines = texts.read_text(encoding='utf-8').splitlines()
    half = Path(tempfile.mkdtemp()) / 'part.jsonl'
    half.write_text('\n'.join(lines[part]) + '\n', encoding='utf-8')
    config = DatasetConfig(source=str(half), max_length=LENGTH, cache_dir=str(half.parent / 'cache'))
    return prepare_dataset(config, tokenizer=tokenizer, template=get_template('internlm_chat', tokenizer))


def batches(data: Any, size: int, steps: int, seed: int) -> Any:
    """Random packs, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data), (size,), generator=generator).tolist()
        batch = collate([data[i] for i in chosen], pad_id=2)
        yield {key: value.cuda() for key, value in batch.items()}


def new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=103168, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
        attention_bias=True, max_position_embeddings=2048, rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda()


def loss_of(model: SupervisedFinetune, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the targets, under bfloat16 autocast as in training."""
    targets = (batch['labels'][:, 1:] != -100).sum()
    with torch.autocast('cuda', torch.bfloat16):
        return model(**batch) / targets


def pretrain(data: Any, steps: int) -> Any:
    """A model that has learnt something of the text."""
    model = SupervisedFinetune(new_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.01, fused=True)
    start = time.perf_counter()
    for step, batch in enumerate(batches(data, 8, steps, seed=1)):
        for group in optimizer.param_groups:
            group['lr'] = 6e-4 * min(1, (step + 1) / 40) * (1 - step / steps)
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f'pretraining step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s', flush=True)
    return model.llm


def quantised(model: Any) -> Any:
    """The same model, frozen, its projections in NF4 with quantised scales, the rest in bfloat16."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != 'lm_head':
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.bfloat16(), requires_grad=False, quant_type='nf4')
            if module.bias is not None:
                new.bias = nn.Parameter(module.bias.data.bfloat16(), requires_grad=False)
            parent, _, name = path.rpartition('.')
            setattr(model.get_submodule(parent), name, new.cuda())
    for module in (model.lm_head, model.model.embed_tokens):
        module.weight.data = module.weight.data.bfloat16()
    model.is_loaded_in_4bit = True
    return model


def tune(model: Any, way: str, data: Any, steps: int, seed: int) -> list[float]:
    """Trains fresh adapters; returns every step's loss."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if 'lora_A' in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif 'lora_B' in name:
            nn.init.zeros_(parameter)
    path = enable_fused_training(model, enabled=way != 'stock', fp8=way == 'fp8')
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trained, lr=2e-4)
    finetune, losses, start = SupervisedFinetune(model).train(), [], time.perf_counter()
    for step, batch in enumerate(batches(data, 2, steps, seed)):
        for group in optimizer.param_groups:
            group['lr'] = 2e-4 * min(1, (step + 1) / 6)
        torch.manual_seed(seed * 10_000 + step)
        loss = loss_of(finetune, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    print(f'{way}, seed {seed}: {path}; loss {values[0]:.4f} to {mean_end(values):.4f} in '
          f'{time.perf_counter() - start:.1f} s', flush=True)  # fmt: skip
    return values


def mean_end(losses: list[float]) -> float:
    return sum(losses[-WINDOW:]) / WINDOW


def smoothed(losses: list[float]) -> Tensor:
    return torch.tensor(losses).unfold(0, WINDOW, 1).mean(1)


def distance(one: list[float], other: list[float]) -> float:
    """Largest distance between two smoothed curves, as a share of the loss."""
    return float(((smoothed(one) - smoothed(other)).abs() / smoothed(other)).max())


def table(curves: dict[str, dict[int, list[float]]]) -> None:
    stock = curves['stock']
    seeds = sorted(stock)
    pairs = [(a, b) for a in seeds for b in seeds if a < b]
    spread = max((distance(stock[a], stock[b]) for a, b in pairs), default=0.0)
    print(f'RESULT stock against itself with another seed: largest distance of curves {spread:.3%}')
    for way in curves:
        ends = ', '.join(f'{mean_end(curves[way][s]):.4f}' for s in seeds)
        far = [f'{distance(curves[way][s], stock[s]):.3%}' for s in seeds]
        off = [f'{mean_end(curves[way][s]) / mean_end(stock[s]) - 1:+.3%}' for s in seeds]
        print(f'RESULT {way}: loss of the last {WINDOW} steps {ends}; against stock, same seed: {", ".join(off)}; '
              f'largest distance {", ".join(far)}')  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tokenizer', type=Path, required=True, help='folder with the published tokenizer.model')
    p.add_argument('--texts', type=Path, required=True, help='gsm8k_train.jsonl')
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--pretrain', type=int, default=400)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--ways', default=','.join(WAYS), help='some of stock,ours,fp8; stock always')
    p.add_argument('--out', type=Path, help='write all losses there as JSON')
    args = p.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / 'tokenizer.model').write_bytes((args.tokenizer / 'tokenizer.model').read_bytes())
    (folder / 'tokenizer_config.json').write_text(json.dumps(TOKENIZER), encoding='utf-8')
    (folder / 'config.json').write_text(json.dumps({'model_type': 'internlm'}), encoding='utf-8')
    tokenizer = load_tokenizer(folder)
    first, second = (packs(args.texts, tokenizer, part) for part in (slice(0, None, 2), slice(1, None, 2)))
    model = add_adapter(quantised(pretrain(first, args.pretrain)), dropout=0.1)
    curves: dict[str, dict[int, list[float]]] = {
        way: {seed: tune(model, way, second, args.steps, seed) for seed in range(args.seeds)}
        for way in WAYS
        if way in ('stock', *args.ways.split(','))
    }
    table(curves)
    if args.out:
        args.out.write_text(json.dumps(curves), encoding='utf-8')


if __name__ == '__main__':
    main()
