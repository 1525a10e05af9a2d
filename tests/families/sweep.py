"""Tries one causal class of transformers, built small, as users reach it: check, loss, packs, generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tests.families.small import CHUNK, VOCAB, WINDOW, small_model
from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.errors import ConfigError, ModelError
from xtuner.inference.generate import Sampling, generate
from xtuner.model.families.packing import packing_unsupported_reason
from xtuner.objectives.model_checks import check_family
from xtuner.objectives.sft import SupervisedFinetune

LENGTHS = (13, 20, 17)  # tokens of the samples
MAX_LENGTH = 64  # tokens of a pack
NEW_TOKENS = 6
assert min(LENGTHS) > max(WINDOW, CHUNK)


@dataclass(frozen=True)
class Result:
    """What was found for a model type; errors are relative, the larger of the loss's and the gradients'.

    Attributes:
        kind: The model type.
        refused: Why it is not trained; '' where it is, else nothing below `generates` holds.
        own_logits: Whether the loss takes the model's own forward pass.
        rows: Error of the samples alone and of padded rows, one sample each.
        pack: Error of all samples in one row.
        unpacked: Why packing is switched off before data is prepared; '' where it is not.
        pack_refused: What the trial of the loaded model says of packs; '' where it lets them pass.
        generates: Whether greedy ids are those of transformers' `generate`.
        generates_as_trained: Whether they are also those of forward passes over the whole text, without a cache.
        no_generation: Why there is no generation; '' where there is.
    """

    kind: str
    refused: str = ''
    own_logits: bool = False
    rows: float = 0.0
    pack: float = 0.0
    unpacked: str = ''
    pack_refused: str = ''
    generates: bool = False
    generates_as_trained: bool = False
    no_generation: str = ''


def examine(kind: str, llm: Any = None) -> Result:
    """Builds a small model of a type, unless one is given, and measures it.

    Raises:
        Exception: whatever transformers raises where the model cannot be built.
    """
    llm = small_model(kind) if llm is None else llm
    model = SupervisedFinetune(llm).eval()
    try:
        check_family(model, packed=False, max_length=MAX_LENGTH)
    except ModelError as error:
        return Result(kind, refused=str(error))
    reference = _with_gradient(llm, lambda: own_loss(llm))
    alone = _error(reference, _with_gradient(llm, lambda: _alone(model)))
    padded = _error(reference, _with_gradient(llm, lambda: _padded(model)))
    pack = _error(reference, _with_gradient(llm, lambda: packed_loss(model)))
    try:
        check_family(model, packed=True, max_length=MAX_LENGTH)
        pack_refused = ''
    except ConfigError as error:
        pack_refused = str(error)
    unpacked = packing_unsupported_reason(llm.config, MAX_LENGTH) or ''
    return Result(
        kind,
        own_logits=model.rule is None,
        rows=max(alone, padded),
        pack=pack,
        unpacked=unpacked,
        pack_refused=pack_refused,
        **_generation(llm),
    )


def samples() -> list[Tensor]:
    """Random ids, int64 (L,) each; special ids and those of images lie elsewhere in the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB // 8, VOCAB // 2, (length,), generator=generator) for length in LENGTHS]


def own_loss(llm: Any) -> Tensor:
    """By the model's own logits, each sample by itself."""
    losses = [
        functional.cross_entropy(
            llm(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction='sum'
        )
        for ids in samples()
    ]
    return torch.stack(losses).sum()


def packed_loss(model: SupervisedFinetune) -> Tensor:
    """All samples in one row, with positions that start again."""
    labels = [torch.cat([torch.tensor([IGNORE_INDEX]), ids[1:]]) for ids in samples()]
    positions = [torch.arange(length) for length in LENGTHS]
    return model(torch.cat(samples())[None], torch.cat(labels)[None], torch.cat(positions)[None])


def _alone(model: SupervisedFinetune) -> Tensor:
    return torch.stack([model(ids[None], ids[None], torch.arange(len(ids))[None]) for ids in samples()]).sum()


def _padded(model: SupervisedFinetune) -> Tensor:
    ids = pad_sequence(samples(), batch_first=True)
    labels = pad_sequence(samples(), batch_first=True, padding_value=IGNORE_INDEX)
    return model(ids, labels, torch.arange(ids.shape[1]).expand(len(ids), -1))


def _with_gradient(llm: Any, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss and its gradients by all parameters, as one vector."""
    llm.zero_grad()
    value = loss()
    value.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in llm.parameters()]
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _error(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> float:
    return max(((one - other).norm() / one.norm()).item() for one, other in zip(expected, found, strict=True))


@torch.no_grad()
def _generation(llm: Any) -> dict[str, Any]:
    prompt = samples()[0].tolist()
    try:
        ours = generate(llm, prompt, stop_ids=[2], sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=0))
    except ModelError as error:
        return {'no_generation': str(error)}
    theirs = llm.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    whole = list(prompt)
    while len(whole) < len(prompt) + NEW_TOKENS and whole[-1] != 2:
        whole.append(int(llm(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    start = len(prompt)
    return {'generates': ours == theirs[0, start:].tolist(), 'generates_as_trained': ours == whole[start:]}
