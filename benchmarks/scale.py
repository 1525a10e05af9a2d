"""Two cards against one: data parallel, sharded, one long pack over both, and the time to start.

    python benchmarks/scale.py --out DIR [--parts ddp,sequence,fsdp,start]

    ddp        InternLM-7B's shape, QLoRA, 4 x 2048 tokens a card: one card, two at once each for itself, `ddp` on two,
               one card again: cards slow down as they get warm, so `ddp` is compared with the mean of both
    sequence   the same model on 1 x 65,536 tokens in 16 samples: one card, then spread over two
    fsdp       the 20B shape (60 layers, 5120 wide, 40 heads, 13824 inner): one card, `ddp` on two, `fsdp` on two
    start      `xtuner train` on a 7B checkpoint in the published format until its first step, on one card and on two;
               and how long two cards take to end when one of them fails

Every figure is printed as it comes, as a line `RESULT {...}`, and all of them are written to DIR/scale.json. Weights
are random; the 20B shape is built straight into 4 bit. What fails is told, and the rest goes on. Where `ddp` on two is
slower than two each for itself, it is for the messages; where these are slower than one, for the machine they share.
`--tiny` does it all on a CPU in small, to test the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

B20 = {'hidden_size': 5120, 'intermediate_size': 13824, 'num_hidden_layers': 60, 'num_attention_heads': 40}
TINY = {'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2,
        'num_attention_heads': 4}  # fmt: skip
PARTS = ('ddp', 'sequence', 'fsdp', 'start')


def report(**result: Any) -> None:
    print('RESULT ' + json.dumps(result), flush=True)


# What a rank does.
def worker(parts: list[str], tiny: bool) -> None:
    from xtuner.engine.distributed.launch import process_group

    with process_group('pytorch') as group:
        if group.rank == 0:
            report(what='machine', **versions())
        if 'ddp' in parts or 'sequence' in parts:
            measure_7b(parts, group, tiny)
        if 'fsdp' in parts:
            measure_20b(group, tiny)


def versions() -> dict[str, str]:
    import bitsandbytes
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    return {'device': device, 'torch': torch.__version__, 'transformers': transformers.__version__,
            'bitsandbytes': bitsandbytes.__version__}  # fmt: skip


def attempt(name: str, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `act` returns; where it fails that is told, and nothing is returned."""
    try:
        return act()
    except Exception as error:
        traceback.print_exc()
        report(what=name, failed=f'{type(error).__name__}: {error}'[:300])
        return {}


def over(one: dict[str, Any], other: dict[str, Any], name: str, digits: int = 3) -> float | None:
    """The ratio of a figure, None where one of the two is not there."""
    return round(one[name] / other[name], digits) if one.get(name) and other.get(name) else None


def build(shape: dict[str, Any], tiny: bool) -> Any:
    """The loss of a 4-bit model under a rank-64 adapter; every layer is computed again, so that peaks compare."""
    import torch

    from benchmarks.qlora_model import add_adapter, build_base, set_checkpointing
    from xtuner.objectives.sft import SupervisedFinetune

    device = 'cpu' if tiny else 'cuda'
    dtype = torch.float32 if tiny else torch.bfloat16
    model = add_adapter(build_base(device, dtype=dtype, storage=dtype, **(TINY if tiny else shape)))
    set_checkpointing(model, True)
    return SupervisedFinetune(model).train()


def batch_of(rows: int, length: int, samples: int, rank: int, tiny: bool) -> dict[str, Any]:
    import torch

    device = 'cpu' if tiny else 'cuda'
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 500 if tiny else 100_000, (rows, length), generator=generator)
    positions = torch.arange(length // samples).repeat(samples).expand(rows, -1)
    batch = {'input_ids': ids, 'labels': ids.clone(), 'position_ids': positions.contiguous()}
    # As the loop hands them over: positions stay on the host.
    return {name: tensor if name == 'position_ids' else tensor.to(device) for name, tensor in batch.items()}


def prepared(strategy: Any, model: Any) -> Any:
    from bitsandbytes.optim import PagedAdamW32bit

    from xtuner.fused.enable import sync_once_per_step

    def make_optimizer(parameters: Any) -> Any:
        optimizer = PagedAdamW32bit(parameters, lr=0.0)  # so that losses compare
        sync_once_per_step(optimizer)
        return optimizer

    return strategy.prepare(model, make_optimizer)


def run_steps(strategy: Any, batch: dict[str, Any], steps: int, *, groups: int, alone: bool = False) -> dict[str, Any]:
    """Steps as the loop does them; the slowest rank's median of the last half, and the largest peak.

    Peaks are what PyTorch allocates: `held_gib` of it is there before the first step. The optimizer's state is paged
    and comes on top.
    """
    import gc

    import torch
    from torch import distributed

    on_gpu = batch['input_ids'].is_cuda
    scaler = torch.amp.GradScaler('cuda' if on_gpu else 'cpu', enabled=False)
    kind, dtype = ('cuda', torch.bfloat16) if on_gpu else ('cpu', torch.bfloat16)
    targets = (batch['labels'].numel() - len(batch['labels'])) * groups
    seconds, loss, norm, held = [], torch.zeros(()), 0.0, 0.0
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**30
    for _ in range(steps):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(kind, dtype, enabled=on_gpu):
            loss = strategy.module(**batch)
        strategy.backward(loss * (strategy.gradient_factor / targets))
        norm = strategy.clip(scaler, 1.0)
        strategy.step(scaler, skipped=False)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    figures = torch.tensor([statistics.median(seconds[steps // 2 :]), peak, held], device=batch['input_ids'].device)
    total = loss.detach().clone()
    if not alone:
        distributed.all_reduce(figures, distributed.ReduceOp.MAX)
        distributed.all_reduce(total)
    slowest, peak, held = figures.tolist()
    state = paged_gib(strategy.optimizer)
    tokens = batch['labels'].numel() * groups
    return {'tokens_per_s': round(tokens / slowest), 'step_s': round(slowest, 4), 'peak_gib': round(peak, 2),
            'held_gib': round(held, 2), 'paged_state_gib': round(state, 2), 'with_state_gib': round(peak + state, 2),
            'loss': round(total.item() / targets, 5), 'gradient_norm': float(f'{norm:.6g}'),
            'first_step_s': round(seconds[0], 2)}  # fmt: skip


def paged_gib(optimizer: Any) -> float:
    """Size of the paged state on this rank, which PyTorch does not count."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if getattr(t, 'is_paged', False)]
    return sum(t.nbytes for t in tensors) / 2**30


def alone_on_rank_0(group: Any, act: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Rank 0 measures while the others wait; all know the result."""
    from torch import distributed

    found: list[Any] = [{}]
    if group.rank == 0:
        found[0] = attempt(name, act)
        if found[0]:
            report(what=name, cards=1, **found[0])
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def measure_7b(parts: list[str], group: Any, tiny: bool) -> None:
    from torch import distributed

    from xtuner.engine.distributed import Single
    from xtuner.engine.distributed.ddp import DataParallel
    from xtuner.engine.distributed.launch import sequence_group
    from xtuner.fused.enable import enable_fused_training

    started = time.perf_counter()
    model = build({}, tiny)
    path = enable_fused_training(model.llm)
    if group.rank == 0:
        report(what='7B built', seconds=round(time.perf_counter() - started, 1), path=str(path))
    length, steps = (64, 4) if tiny else (2048, 16)
    batch = batch_of(4, length, 1, group.rank, tiny)
    long, long_steps = (256, 2) if tiny else (65536, 2)
    pack = batch_of(1, long, 16, 0, tiny)
    one: dict[str, Any] = {}
    one_long: dict[str, Any] = {}
    alone: list[Any] = [None] * group.world_size  # each card's speed, for itself while the others work, too

    def single(what: dict[str, Any], steps: int) -> dict[str, Any]:
        return run_steps(prepared(Single(), model), what, steps, groups=1, alone=True)

    if 'ddp' in parts:
        one = alone_on_rank_0(group, lambda: single(batch, steps), '7B 4x2048 single')
        both = attempt('7B 4x2048, both cards at once', lambda: single(batch, steps))
        if both:  # each rank tells its own
            report(what='7B 4x2048, both cards at once, each for itself', rank=group.rank, **both)
        distributed.all_gather_object(alone, both.get('tokens_per_s'))
    if 'sequence' in parts:
        one_long = alone_on_rank_0(group, lambda: single(pack, long_steps), '7B 1x65536 single')
    two = prepared(DataParallel(group.rank, group.world_size), model)
    if 'ddp' in parts:
        result = attempt('7B ddp', lambda: run_steps(two, batch, steps, groups=group.world_size))
        again = alone_on_rank_0(group, lambda: single(batch, steps), '7B 4x2048 single, again')
        if group.rank == 0 and result and one and again:
            speed = result['tokens_per_s']
            mean = statistics.mean([one['tokens_per_s'], again['tokens_per_s']])
            report(what='7B 4x2048 a card, ddp', cards=group.world_size, **result, speedup=round(speed / mean, 3),
                   of_all_for_themselves=round(speed / sum(alone), 3) if all(alone) else None)  # fmt: skip
    if 'sequence' in parts:
        model.share_sequences(sequence_group(group.world_size))
        result = attempt('7B sequence parallel', lambda: run_steps(two, pack, long_steps, groups=1))
        if group.rank == 0 and result:
            report(what='7B 1x65536, sequence parallel', cards=group.world_size, **result,
                   speedup=over(result, one_long, 'tokens_per_s'), loss_of_one=over(result, one_long, 'loss', 6),
                   gradient_norm_of_one=over(result, one_long, 'gradient_norm', 6))  # fmt: skip


def measure_20b(group: Any, tiny: bool) -> None:
    import gc

    from xtuner.engine.distributed import Single
    from xtuner.engine.distributed.ddp import DataParallel
    from xtuner.engine.distributed.fsdp import FullyShard
    from xtuner.fused.enable import enable_fused_training

    started = time.perf_counter()
    model = build(B20, tiny)
    enable_fused_training(model.llm)
    if group.rank == 0:
        report(what='20B built', seconds=round(time.perf_counter() - started, 1))
    length, steps = (64, 4) if tiny else (2048, 4)
    batch = batch_of(4, length, 1, group.rank, tiny)
    single = alone_on_rank_0(
        group, lambda: run_steps(prepared(Single(), model), batch, steps, groups=1, alone=True), '20B 4x2048 single'
    )

    def run_on_all(strategy: Any) -> dict[str, Any]:
        return run_steps(prepared(strategy, model), batch, steps, groups=group.world_size)

    ddp = attempt('20B ddp', lambda: run_on_all(DataParallel(group.rank, group.world_size)))
    if group.rank == 0 and ddp:
        report(what='20B 4x2048 a card, ddp', cards=group.world_size, **ddp)
    gc.collect()
    enable_fused_training(model.llm, sharded=True)
    fsdp = attempt('20B fsdp', lambda: run_on_all(FullyShard(group.rank, group.world_size)))
    if group.rank == 0 and fsdp:
        report(what='20B 4x2048 a card, fsdp', cards=group.world_size, **fsdp,
               peak_of_one=over(fsdp, single, 'peak_gib'), with_state_of_one=over(fsdp, single, 'with_state_gib'),
               speed_of_ddp=over(fsdp, ddp, 'tokens_per_s'), loss_of_ddp=over(fsdp, ddp, 'loss', 6),
               gradient_norm_of_ddp=over(fsdp, ddp, 'gradient_norm', 6))  # fmt: skip


# What is measured from outside.
def second_rank_fails() -> Any:
    """A hook for a config: the second rank fails at its second step."""
    from mmengine.hooks import Hook

    class Fail(Hook):
        """Fails."""

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            """At the second step."""
            if runner.rank == 1 and batch_idx == 1:
                print(f'FAILING {time.time()}', file=sys.stderr, flush=True)
                raise RuntimeError('the second rank fails on purpose')

    return Fail()


def anonymous_gib() -> list[float]:
    """Host memory of each process that trains, without mapped files: largest of `RssAnon` now."""
    found = []
    for status in Path('/proc').glob('[0-9]*/status'):
        try:
            text = status.read_text(encoding='ascii')
            words = (status.parent / 'cmdline').read_bytes()
        except OSError:
            continue
        if b'xtuner.cli.main' in words and 'RssAnon' in text:
            line = next(line for line in text.splitlines() if line.startswith('RssAnon'))
            found.append(int(line.split()[1]) / 2**20)
    return found


def start_up(folder: Path, tiny: bool) -> None:
    root = Path(__file__).parent.parent
    model, data = folder / 'model', folder / 'data.jsonl'
    for name in ('1-card', '2-cards', '2-cards-fsdp', 'fail', 'cache'):  # of a run before
        shutil.rmtree(folder / name, ignore_errors=True)
    with data.open('w', encoding='utf-8') as file:
        for i in range(64):
            text = ' '.join(str(i * j) for j in range(40))
            messages = [{'role': 'user', 'content': f'Count {i}.'}, {'role': 'assistant', 'content': text}]
            file.write(json.dumps({'messages': messages}) + '\n')
    words = [sys.executable, '-m', 'xtuner.cli.main', 'train', 'internlm_7b_qlora_oasst1', '--model', str(model),
             '--data', str(data), '--max-steps', '1']  # fmt: skip
    options = ['--cfg-options', 'samples.prompts=[]', 'log.trackers=[]', 'schedule.accumulative_counts=1',
               'dataset.max_length=512', f'dataset.cache_dir={folder / "cache"}']  # fmt: skip
    environment = os.environ | {'PYTHONPATH': f'{root}:{os.environ.get("PYTHONPATH", "")}'}
    times: dict[str, float] = {}
    for name, cards, strategy in (('1 card', 1, 'auto'), ('2 cards', 2, 'auto'), ('2 cards fsdp', 2, 'fsdp')):
        run = [*words, '--work-dir', str(folder / name.replace(' ', '-')), '--nproc-per-node', str(cards),
               '--strategy', strategy, *options]  # fmt: skip
        peaks, done = [0.0], threading.Event()

        def watch(peaks: list[float] = peaks, done: threading.Event = done) -> None:
            while not done.wait(0.3):
                peaks[0] = max([peaks[0], *anonymous_gib()])

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        loaded, first_step, lines = None, None, []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if 'loaded in' in line:
                loaded = line.rsplit('loaded in ', 1)[1].split(' s')[0]
            if 'step 1/1' in line:
                first_step = round(time.perf_counter() - began, 2)
        status = process.wait()
        done.set()
        watcher.join()
        if status:
            print(''.join(lines[-15:]), flush=True)
        times[name] = first_step or 0.0
        report(what=f'start on {name}', to_first_step_s=first_step, model_loaded_s=loaded, status=status,
               host_anonymous_gib=round(peaks[0], 2))  # fmt: skip
    report(what='start, two cards over one', ddp=over(times, {'2 cards': times['1 card']}, '2 cards'),
           fsdp=over(times, {'2 cards fsdp': times['1 card']}, '2 cards fsdp'))  # fmt: skip
    run = [*words[:-1], '5', '--work-dir', str(folder / 'fail'), '--nproc-per-node', '2', *options,
           "hooks=[{'type': 'benchmarks.scale:second_rank_fails'}]"]  # fmt: skip
    ended = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    now = time.time()
    failed = next((float(line.split()[1]) for line in ended.stderr.splitlines() if line.startswith('FAILING')), now)
    report(what='one of two cards fails', status=ended.returncode, seconds_to_end=round(now - failed, 2),
           last_line=(ended.stderr.strip().splitlines() or [''])[-1][:200])  # fmt: skip


def write_7b(folder: Path, tiny: bool) -> None:
    from benchmarks.internlm_7b import write_checkpoint
    from demo.tokenizer import train_tokenizer

    started = time.perf_counter()
    if (folder / 'written').exists():
        report(what='7B there from a run before')
        return
    shutil.rmtree(folder / 'model', ignore_errors=True)
    train_tokenizer([Path(__file__).parent.parent / 'demo' / 'base.jsonl'], folder, vocab_size=800)
    changes = {'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2, 'num_attention_heads': 4,
               'vocab_size': 800} if tiny else {}  # fmt: skip
    write_checkpoint(folder / 'model', folder / 'tokenizer.model', **changes)
    (folder / 'written').touch()
    report(what='7B written', seconds=round(time.perf_counter() - started, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--parts', default=','.join(PARTS))
    parser.add_argument('--scratch', type=Path, default=Path('/tmp/scale'), help='where the 7B checkpoint is written')
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--worker', action='store_true')
    parser.add_argument('--write', action='store_true')
    parser.add_argument('--start', action='store_true')
    args = parser.parse_args()
    parts = args.parts.split(',')
    if args.worker:
        worker(parts, args.tiny)
        return
    if args.start:
        start_up(args.scratch, args.tiny)
        return
    if args.write:
        write_7b(args.scratch, args.tiny)
        return
    run_parts(args, parts)


def run_parts(args: argparse.Namespace, parts: list[str]) -> None:
    """Each part in processes of its own, so that what is left of one spoils no other's memory."""
    args.out.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parent.parent
    environment = os.environ | {'PYTHONPATH': f'{root}:{os.environ.get("PYTHONPATH", "")}'}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    own = ['--out', str(args.out), '--scratch', str(args.scratch), *(['--tiny'] if args.tiny else [])]
    lines: list[str] = []
    writer = None
    if 'start' in parts:  # on the CPU, beside the other parts
        args.scratch.mkdir(parents=True, exist_ok=True)
        writer = subprocess.Popen([sys.executable, __file__, '--write', *own],
                                  env=environment | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '4'})  # fmt: skip
    for chosen, limit_s in ((['ddp', 'sequence'], 200), (['fsdp'], 150), (['start'], 200)):
        now = [part for part in chosen if part in parts]
        if not now:
            continue
        began = time.perf_counter()
        if writer is not None and chosen == ['start']:
            writer.wait()
            print(f'--- waited {time.perf_counter() - began:.0f} s for the checkpoint', flush=True)
        launcher, mode = ([sys.executable], '--start') if chosen == ['start'] else (torchrun, '--worker')
        words = [*launcher, __file__, '--parts', ','.join(now), mode, *own]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(limit_s, process.terminate)  # a rank that fails alone leaves the other waiting
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end='', flush=True)
            if line.startswith('RESULT '):
                lines.append(line.removeprefix('RESULT ').strip())
                (args.out / 'scale.json').write_text('[' + ',\n'.join(lines) + ']\n', encoding='utf-8')
        status = process.wait()
        timer.cancel()
        print(f'--- {",".join(now)}: exit status {status}, {time.perf_counter() - began:.0f} s', flush=True)


if __name__ == '__main__':
    main()
