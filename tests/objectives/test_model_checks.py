"""Other families: the loss is that of the model's own logits; one that mixes the samples of a pack is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.families.small import small_config, small_model
from tests.model.random_models import MIXING, SEPARATE, make_model
from xtuner.errors import ConfigError, ModelError
from xtuner.inference.batching import BatchDecoder
from xtuner.memory.dims import model_dims
from xtuner.model.logits import LogitRule
from xtuner.objectives.model_checks import check_family
from xtuner.objectives.sft import SupervisedFinetune

FAMILIES = SEPARATE + MIXING
LENGTHS = (9, 5, 14)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]


def own_loss(llm: Any) -> Tensor:
    """By the model's own forward pass, each sample by itself."""
    total = torch.zeros(())
    for ids in samples():
        logits = llm(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + functional.cross_entropy(logits.float(), ids[1:], reduction='sum')
    return total


def our_loss(model: SupervisedFinetune, *, packed: bool) -> Tensor:
    if not packed:
        return sum((model(i[None], i[None], torch.arange(len(i))[None]) for i in samples()), torch.zeros(()))
    ids = torch.cat(samples())
    labels = torch.cat([torch.cat([torch.tensor([-100]), one[1:]]) for one in samples()])
    return model(ids[None], labels[None], torch.cat([torch.arange(length) for length in LENGTHS])[None])


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('kind', FAMILIES)
def test_the_loss_is_that_of_the_model_s_own_logits(kind: str) -> None:
    llm = make_model(kind)
    model = SupervisedFinetune(llm).eval()
    check_family(model, packed=False, max_length=64)
    expected = own_loss(llm)
    ours = our_loss(model, packed=False)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, found = gradient(llm, expected), gradient(llm, ours)
    assert (wanted - found).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize('kind', SEPARATE)
def test_a_pack_is_its_samples(kind: str) -> None:
    model = SupervisedFinetune(make_model(kind)).eval()
    check_family(model, packed=True, max_length=64)
    with torch.no_grad():
        assert our_loss(model, packed=True).item() == pytest.approx(our_loss(model, packed=False).item(), rel=1e-5)


@pytest.mark.parametrize('kind', MIXING)
def test_a_model_that_mixes_the_samples_of_a_pack_is_refused(kind: str) -> None:
    model = SupervisedFinetune(make_model(kind)).train()
    with pytest.raises(ConfigError, match=rf"'{kind}' the samples of a pack see each other.*set dataset.packing=none"):
        check_family(model, packed=True, max_length=64)
    assert model.training
    with torch.no_grad():  # it is true
        model.eval()
        assert our_loss(model, packed=True).item() != pytest.approx(our_loss(model, packed=False).item(), rel=1e-4)


@pytest.mark.parametrize('kind', ['gemma2', 'mixtral', 'qwen2_moe', 'granitemoe', 'bloom', 'mamba'])
def test_the_answer_is_the_same_in_half_precision(kind: str) -> None:
    """Experts are multiplied in other sizes for other tokens, which in half precision moves a sample's own states."""
    model = SupervisedFinetune(make_model(kind, torch.bfloat16))
    if kind in MIXING:
        with pytest.raises(ConfigError, match='see each other'):
            check_family(model, packed=True, max_length=64)
    else:
        check_family(model, packed=True, max_length=64)
        assert model.rule is not None


def test_logits_by_a_rule_that_is_not_known_come_from_the_model(caplog: pytest.LogCaptureFixture) -> None:
    llm = make_model('qwen2')
    llm.lm_head.register_forward_hook(lambda module, arguments, logits: logits + 3 * torch.sin(logits))
    llm.get_output_embeddings = lambda: torch.nn.Linear(32, 97, bias=False)  # what we multiply with is something else
    model = SupervisedFinetune(llm).eval()
    assert model.rule == LogitRule()
    with caplog.at_level(logging.WARNING, logger='xtuner'):
        check_family(model, packed=True, max_length=64)
    assert model.rule is None and "of type 'qwen2' do not follow from its output head" in caplog.text
    for packed in (False, True):
        assert our_loss(model, packed=packed).item() == pytest.approx(own_loss(llm).item(), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_cap_that_acts_on_large_logits_alone_is_seen(dtype: torch.dtype) -> None:
    """The logits of a few random tokens are small, so that a cap of 50 changes them by less than rounding."""
    llm = make_model('gemma2', dtype)
    llm.lm_head.weight.data *= 0.01
    ids = samples()[0][None]
    llm.config.final_logit_softcapping = 50.0
    with torch.no_grad():
        capped = llm(ids).logits
        model = SupervisedFinetune(llm)
        check_family(model, packed=False, max_length=64)
        assert model.rule == LogitRule(1.0, 50.0)
        model.rule = LogitRule()  # as if the field had another name
        check_family(model, packed=False, max_length=64)
        assert model.rule is None
        llm.config.final_logit_softcapping = None
        assert (llm(ids).logits - capped).norm() < 5e-3 * capped.norm()
        model.rule = LogitRule()
        check_family(model, packed=False, max_length=64)
        assert model.rule == LogitRule()


def test_a_pack_longer_than_a_chunk_of_attention_is_refused() -> None:
    model = SupervisedFinetune(small_model('llama4_text')).eval()
    text = model.base.config
    text.attention_chunk_size = 48
    check_family(model, packed=True, max_length=48)
    with pytest.raises(ConfigError, match=r'longer than `attention_chunk_size` \(48\); set dataset.max_length to that'):
        check_family(model, packed=True, max_length=49)
    assert text.attention_chunk_size == 48


@pytest.mark.parametrize('kind', ['mistral', 'gemma2', 'cohere2'])
def test_windows_are_tried_and_left_as_they_were(kind: str) -> None:
    model = SupervisedFinetune(make_model(kind, torch.bfloat16)).eval()
    model.base.config.sliding_window = 40
    check_family(model, packed=True, max_length=64)
    assert model.base.config.sliding_window == 40


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('bert', r"'bert' a token depends on later ones.*, unless \"is_decoder\": true in its config.json"),
        ('prophetnet', "'prophetnet' a token depends on later ones or on how many follow"),
        ('roberta', "'roberta' does not count the positions of a text 0, 1, 2, ..."),
        ('reformer', "'reformer' cannot be trained here: it trains only on rows of exactly"),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_model_that_cannot_learn_to_continue_texts_is_refused(kind: str, message: str, dtype: torch.dtype) -> None:
    model = SupervisedFinetune(small_model(kind).to(dtype)).train()
    with pytest.raises(ModelError, match=message):
        check_family(model, packed=False, max_length=64)
    assert model.training


def test_bert_as_a_decoder_is_trained() -> None:
    config = small_config('bert')
    config.is_decoder = True
    model = SupervisedFinetune(AutoModelForCausalLM.from_config(config)).eval()
    check_family(model, packed=False, max_length=64)
    assert our_loss(model, packed=False).item() == pytest.approx(own_loss(model.llm).item(), rel=1e-5)


def test_the_same_rule_for_a_head_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    for kind in ('gemma2', 'cohere', 'granite'):
        torch.manual_seed(0)
        llm = get_peft_model(
            make_model(kind), LoraConfig(target_modules=['lm_head', 'q_proj'], init_lora_weights=False)
        )
        model = SupervisedFinetune(llm).eval()
        check_family(model, packed=True, max_length=64)
        assert model.rule is not None
        assert our_loss(model, packed=True).item() == pytest.approx(own_loss(llm).item(), rel=1e-5)


@pytest.mark.parametrize(('max_length', 'packed', 'warned'), [(64, True, True), (32, True, False), (64, False, False)])
def test_angles_that_depend_on_the_longest_sample_are_told(
    max_length: int, packed: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_model('qwen2')
    rope = {'rope_type': 'longrope', 'original_max_position_embeddings': 32}
    llm.config.rope_parameters = dict(llm.config.rope_parameters) | rope
    with caplog.at_level(logging.WARNING, logger='xtuner'):
        check_family(SupervisedFinetune(llm), packed=packed, max_length=max_length)
    assert ('one of more than 32 tokens changes the others' in caplog.text) is warned


@pytest.mark.parametrize('kind', ['gemma2', 'gemma3_text', 'mistral', 'bloom'])
def test_other_families_are_generated_by_transformers(kind: str) -> None:
    """`hidden_activation` is what Gemma calls its activation."""
    from xtuner.inference.decode.layers import unsupported_reason
    from xtuner.inference.generate import Sampling, generate

    llm = make_model(kind)
    assert unsupported_reason(llm) is not None
    ids = samples()[0].tolist()
    answer = generate(llm, ids, stop_ids=[2], sampling=Sampling(max_new_tokens=4, temperature=0))
    expected = llm.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert answer == expected[0, len(ids) :].tolist()


def test_a_composite_config_has_its_heads_in_its_text_model() -> None:
    from transformers import AutoConfig

    from xtuner.fused.enable import check_heads

    composite = AutoConfig.for_model('gemma3')
    check_heads(composite, 1)
    check_heads(composite, composite.text_config.num_key_value_heads)
    with pytest.raises(ConfigError, match='does not divide'):
        check_heads(composite, 7)
    check_heads(AutoConfig.for_model('mamba'), 1)
    with pytest.raises(ConfigError, match='has no attention heads'):
        check_heads(AutoConfig.for_model('mamba'), 2)


@pytest.mark.parametrize('kind', ['gpt2', 'bloom', 'falcon', 'mpt', 'opt', 'mamba', 'gemma2', 'llama'])
def test_the_shape_of_any_family_is_counted(kind: str) -> None:
    llm = make_model(kind)
    shape = model_dims(llm.config, None)
    assert shape.num_layers == 2
    assert shape.num_base == sum(p.numel() for p in llm.parameters())


def test_bloom_is_refused_for_batches_in_a_line() -> None:
    with pytest.raises(ModelError, match="batch decoding does not support models of type 'bloom'") as caught:
        BatchDecoder(make_model('bloom'), num_slots=2, max_length=32)
    assert '\n' not in str(caught.value)
