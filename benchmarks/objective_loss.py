"""What a loss on target rows costs against the fused cross entropy of supervised fine-tuning, at equal shapes.

    python benchmarks/objective_loss.py [--tokens 8192] [--hidden 4096] [--vocabulary 92544] [--rounds 20]

Times the head and the loss alone, forward and backward, on the GPU in bfloat16 if there is one, else on the CPU in
float32 with small sizes. Each round runs every case once, in turn, so that a noisy machine harms all alike; the median
of the rounds and the peak of the memory beyond what was there before are printed, and their ratios to the first case.
The head is frozen, as under LoRA, or trained, as in full tuning.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from xtuner.fused.loss import fused_linear_cross_entropy
from xtuner.fused.target_values import fused_target_values

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def of_values(*values: str, no_grad: tuple[str, ...] = ()) -> Loss:
    """A loss that differentiates by all of these values but the last ones."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        needs_base = 'kl_to_base' in values or 'base_log_prob' in values
        found = fused_target_values(hidden, weight, None, labels, values, no_grad=no_grad,
                                    base_hidden_TH=base if needs_base else None)  # fmt: skip
        return -sum(value.sum() for name, value in found.items() if name not in no_grad)  # type: ignore[return-value]

    return loss


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, base: Tensor) -> Tensor:
    return fused_linear_cross_entropy(hidden, weight, None, labels)


CASES: dict[str, Loss] = {
    'cross entropy (SFT)': cross_entropy,
    'log_prob': of_values('log_prob'),
    'log_prob, entropy without gradient': of_values('log_prob', 'entropy', no_grad=('entropy',)),
    'log_prob, sum_log_probs': of_values('log_prob', 'sum_log_probs'),
    'log_prob, log_sum_exp': of_values('log_prob', 'log_sum_exp'),
    'log_prob, entropy': of_values('log_prob', 'entropy'),
    'log_prob, kl_to_base': of_values('log_prob', 'kl_to_base'),
}


def once(loss: Loss, tensors: list[Tensor]) -> tuple[float, float]:
    """Seconds and bytes of one forward and backward pass."""
    on_gpu = tensors[0].is_cuda
    for tensor in tensors:
        tensor.grad = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    loss(*tensors).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, float(torch.cuda.max_memory_allocated() - before) if on_gpu else 0.0


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=8192 if on_gpu else 512)
    parser.add_argument('--hidden', type=int, default=4096 if on_gpu else 256)
    parser.add_argument('--vocabulary', type=int, default=92544 if on_gpu else 8192)
    parser.add_argument('--rounds', type=int, default=20)
    arguments = parser.parse_args()
    device, dtype = ('cuda', torch.bfloat16) if on_gpu else ('cpu', torch.float32)
    torch.manual_seed(0)
    sizes = arguments.tokens, arguments.hidden, arguments.vocabulary
    name = torch.cuda.get_device_name() if on_gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, {dtype}, torch {torch.__version__}: {sizes[0]} targets x {sizes[1]} x {sizes[2]} words')
    hidden = torch.randn(sizes[0], sizes[1], device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(sizes[2], sizes[1], device=device) / sizes[1] ** 0.5).to(dtype)
    labels = torch.randint(0, sizes[2], sizes[:1], device=device)
    base = torch.randn_like(hidden)
    for trained in (False, True):
        weight.requires_grad_(trained)
        measured: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for number in range(arguments.rounds + 2):
            for case, loss in CASES.items():
                result = once(loss, [hidden, weight, labels, base])
                if number > 1:  # kernels are compiled and chosen in the first ones
                    measured[case].append(result)
        report('trained' if trained else 'frozen', measured)


def report(head: str, measured: dict[str, list[tuple[float, float]]]) -> None:
    """Prints the medians and their ratios."""
    medians = {case: [statistics.median(column) for column in zip(*found)] for case, found in measured.items()}  # noqa: B905
    seconds, peak = next(iter(medians.values()))
    print(f'\n{head} head{"":30} ms   ratio  peak MiB   ratio')
    for case, (own_seconds, own_peak) in medians.items():
        memory = f'{own_peak / 2**20:9.0f} {own_peak / peak:7.3f}' if peak else ''
        print(f'{case:36} {1000 * own_seconds:7.2f} {own_seconds / seconds:7.3f} {memory}')


if __name__ == '__main__':
    main()
