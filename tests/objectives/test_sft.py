"""The loss against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.objectives.sft import SupervisedFinetune, next_token_loss


@pytest.fixture(scope='module')
def llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, attention_bias=True, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_loss_is_the_sum_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 8, generator=generator)
    head = torch.nn.Linear(8, 13, bias=False)
    targets = torch.tensor([3, -100, 12, 0, -100, 5, 5, -100, 1])
    logits = hidden.double() @ head.weight.double().T
    expected = -sum(torch.log_softmax(logits[i], 0)[t] for i, t in enumerate(targets.tolist()) if t != -100)
    # float32 against float64: about 1e-7 relative for sums of a few terms
    assert next_token_loss(hidden, head, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_target_the_loss_is_zero_and_has_a_gradient() -> None:
    head = torch.nn.Linear(8, 13)
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = next_token_loss(hidden, head, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


def test_labels_shift_by_one(llm: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 61, (2, 7))
    labels = ids.clone()
    labels[:, 0] = -100
    labels[1, 3:] = -100
    logits = llm(ids).logits.double()
    rows = [(0, t) for t in range(1, 7)] + [(1, 1), (1, 2)]
    expected = -sum(torch.log_softmax(logits[b, t - 1], 0)[ids[b, t]] for b, t in rows)
    loss = SupervisedFinetune(llm)(ids, labels, torch.arange(7).repeat(2, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('first', [0, 3, 4, 9])  # a step back to the first or another position, the same one, a jump
def test_the_samples_of_a_pack_do_not_see_each_other(llm: LlamaForCausalLM, first: int) -> None:
    sft = SupervisedFinetune(llm)
    a, b = torch.randint(0, 61, (1, 5)), torch.randint(0, 61, (1, 8))

    def loss(ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> float:
        return sft(ids, labels, positions[None]).item()

    def labels_of(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1)

    alone = loss(a, torch.arange(5), labels_of(a)) + loss(b, torch.arange(8), labels_of(b))
    positions = torch.cat([torch.arange(5), torch.arange(first, first + 8)])
    packed = loss(torch.cat([a, b], 1), positions, torch.cat([labels_of(a), labels_of(b)], 1))
    assert packed == pytest.approx(alone, rel=1e-5)
    joined = loss(torch.cat([a, b], 1), torch.arange(13), torch.cat([labels_of(a), labels_of(b)], 1))
    assert joined != pytest.approx(alone, rel=1e-3)  # what it would be if one saw the other
    other_b = (b + 1) % 61
    only_a = torch.cat([labels_of(a), torch.full((1, 8), -100)], 1)
    assert loss(torch.cat([a, b], 1), positions, only_a) == loss(torch.cat([a, other_b], 1), positions, only_a)


def test_flash_attention_gets_one_row(llm: LlamaForCausalLM) -> None:
    """It tells samples apart in a batch of one row only, and the loss must not depend on that."""
    seen: list[tuple[int, ...]] = []

    class Joined(torch.nn.Module):
        config = type('Config', (), {'_attn_implementation': 'flash_attention_2'})

        def get_decoder(self):
            def decode(input_ids, position_ids, use_cache):
                seen.append(tuple(input_ids.shape))
                return llm.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

            return decode

        def get_output_embeddings(self):
            return llm.lm_head

    ids = torch.randint(0, 61, (3, 6))
    positions = torch.arange(6).repeat(3, 1)
    labels = torch.cat([torch.full((3, 1), -100), ids[:, 1:]], 1)
    joined = SupervisedFinetune(Joined())(ids, labels, positions)
    assert seen == [(1, 18)]
    assert joined.item() == pytest.approx(SupervisedFinetune(llm)(ids, labels, positions).item(), rel=1e-5)
