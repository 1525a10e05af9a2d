"""What the fused path leaves to the model's own forward pass, and what it must not change."""

import copy
import logging

import pytest
import torch

from tests.fused.test_layer import error, step
from tests.tiny_models import DEVICE, quantise, tiny_llama, with_adapter
from xtuner.fused.enable import enable_fused_training, sync_once_per_step

pytest.importorskip('bitsandbytes')


def same_as_stock(model, batch, caplog, reason):
    """One step with the fused path requested: bit-equal to the model's own forward pass, and the reason logged once."""
    _, stock = step(model, batch)
    path = enable_fused_training(model)
    with caplog.at_level(logging.WARNING, 'xtuner'):
        _, grads = step(model, batch)
        step(model, batch)
    assert all(torch.equal(grads[n], stock[n]) for n in stock)
    assert len(path.fallbacks) == 1 and reason in path.fallbacks[0]
    assert caplog.text.count(reason) == 1


def test_says_what_it_did(model):
    path = enable_fused_training(model)
    kernels = 'plain' if DEVICE == 'cpu' else 'triton'
    assert path.enabled and str(path).startswith(f'fused training path on: {kernels} kernels')
    assert ('14 of its 4-bit weights cached as floats' in str(path)) == (DEVICE == 'cpu')


def test_switched_off_is_the_own_forward_pass(model, batch):
    _, stock = step(model, batch)
    enable_fused_training(model)
    assert 'forward' in vars(model.get_base_model().model)
    path = enable_fused_training(model, enabled=False)
    _, grads = step(model, batch)
    assert str(path) == 'fused training path off: switched off' and 'forward' not in vars(model.get_base_model().model)
    assert all(torch.equal(grads[n], stock[n]) for n in stock)


def test_dora_takes_the_own_forward_pass(batch, caplog):
    model = with_adapter(quantise(tiny_llama(layers=1)), use_dora=True)
    same_as_stock(model, batch, caplog, 'variant of LoRA')


def test_two_active_adapters_take_the_own_forward_pass(model, batch, caplog):
    model.add_adapter('other', copy.deepcopy(model.peft_config['default']))
    model.base_model.set_adapter(['default', 'other'])
    same_as_stock(model, batch, caplog, '2 adapters are active')


def test_disabled_adapter_gives_the_base_model(model, batch):
    args = {k: batch[k] for k in ('input_ids', 'position_ids')}
    with torch.no_grad(), model.disable_adapter():
        stock = model(**args).logits
        enable_fused_training(model)
        assert torch.allclose(model(**args).logits, stock, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(**args).logits, stock, atol=1e-3)


def test_models_it_does_not_know_are_left_alone():
    model = torch.nn.Linear(2, 2)
    path = enable_fused_training(model)
    assert not path.enabled and 'no spec describes' in str(path)


def test_trained_base_weights_and_hooks_are_obstacles(model):
    handle = model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert 'hook' in enable_fused_training(model).reason_disabled
    handle.remove()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    assert 'trainable' in enable_fused_training(model).reason_disabled


@pytest.mark.parametrize('name', ['', 'layers.1', 'layers.0.mlp'])
def test_a_forward_that_somebody_put_on_a_module_stays_and_is_an_obstacle(model, name):
    module = model.get_base_model().model.get_submodule(name)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    replaced = module.forward
    for _ in range(2):
        assert 'has been replaced' in enable_fused_training(model).reason_disabled
        assert module.__dict__['forward'] is replaced
    del module.forward
    assert enable_fused_training(model).enabled and enable_fused_training(model, sharded=True).enabled
    assert not enable_fused_training(model, enabled=False).enabled


def test_a_hook_of_accelerate_on_a_linear_layer_is_an_obstacle(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.get_base_model().model.layers[0].mlp.up_proj.base_layer, ModelHook())
    assert 'the forward of layers.0.mlp.up_proj' in enable_fused_training(model).reason_disabled


def test_evaluation_and_generation_are_untouched(model, batch):
    model.eval()
    prompt = batch['input_ids'][1:, :5]
    stock = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    enable_fused_training(model)
    fast = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(stock, fast)


def test_attention_mask_takes_the_own_forward_pass(model, batch):
    mask = torch.ones_like(batch['input_ids'])
    mask[0, -4:] = 0
    stock = model(input_ids=batch['input_ids'], attention_mask=mask).logits
    enable_fused_training(model)
    assert torch.equal(model(input_ids=batch['input_ids'], attention_mask=mask).logits, stock)


def test_saved_adapter_is_plain_peft(model, batch, tmp_path):
    from peft import PeftModel

    enable_fused_training(model)
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantise(tiny_llama()), tmp_path, is_trainable=True).train()
    assert set(again.state_dict()) == names
    loss, grads = step(again, batch)
    fast_loss, fast_grads = step(model, batch)
    assert loss == pytest.approx(fast_loss, rel=1e-5) and error(fast_grads, grads) < 1e-4


def test_second_backward_pass_is_refused(model, batch):
    enable_fused_training(model)
    hidden = model.get_base_model().model(input_ids=batch['input_ids'], use_cache=False).last_hidden_state
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='second backward pass'):
        hidden.sum().backward()


def test_gradients_accumulate_over_batches(model, batch):
    enable_fused_training(model)
    _, once = step(model, batch)
    model.zero_grad()
    for _ in range(2):
        logits = model(input_ids=batch['input_ids'], position_ids=batch['position_ids']).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch['labels'][:, 1:].flatten(), reduction='sum').backward()
    twice = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    assert error(twice, {n: 2 * g for n, g in once.items()}) < 1e-5


@pytest.mark.slow
def test_two_hundred_steps_give_the_own_forward_passs_curve(batch):
    """Same data, same initial weights, float32: the loss curves coincide."""
    curves = []
    for fast in (False, True):
        model = with_adapter(quantise(tiny_llama(layers=1)))
        enable_fused_training(model, enabled=fast)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        curve = []
        for _ in range(200):
            curve.append(step(model, batch)[0])
            optimizer.step()
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert float(((curves[1] - curves[0]).abs() / curves[0]).max()) < 2e-2


def test_synchronizing_once_per_step_changes_nothing():
    import bitsandbytes as bnb

    results = []
    for once in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, 512)) for n in (3, 300)]
        optimizer = bnb.optim.PagedAdamW32bit(parameters, lr=1e-2)
        if once:
            assert sync_once_per_step(optimizer)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.sin(p.detach() * 3)
            optimizer.step()
        results.append((parameters, optimizer.state[parameters[1]]['state1']))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])
    assert not sync_once_per_step(torch.optim.SGD(results[0][0], lr=1.0))
