"""The fused path on a tiny model: gradients of every adapter against the model's own forward pass and float64."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_models import DEVICE, dequantised, quantise, tiny_internlm2, tiny_llama, triton_obstacle, with_adapter
from xtuner.fused import layer
from xtuner.fused.decoder import FusedDecoder
from xtuner.fused.enable import enable_fused_training
from xtuner.kernels import cpu_gemm
from xtuner.kernels.dispatch import PLAIN, fused_kernels

pytest.importorskip('bitsandbytes')


def step(model, batch, *, dtype=None):
    """Loss and gradients of all adapters."""
    model.zero_grad()
    loss = loss_of(model, batch, dtype=dtype)
    loss.backward()
    return float(loss.detach()), {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model, batch, *, dtype=None):
    """The loss, from which gradients can be computed."""
    with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        base = model.get_base_model()
        hidden = base.model(
            input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False
        ).last_hidden_state
        logits = base.lm_head(hidden)[:, :-1].flatten(0, 1)
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide, batch['labels'][:, 1:].flatten(), reduction='sum')


def error(grads, exact):
    """The relative error of all gradients together, and of the worst one."""
    assert grads.keys() == exact.keys()
    each = {n: float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact}
    assert all(float(exact[n].norm()) > 0 for n in exact)
    return max(each.values())


def force(model, kernels, *, fused_lora):
    """Enables the fused path with these kernels, whatever the device."""
    path = enable_fused_training(model)
    assert path.enabled
    decoder = model.get_base_model().model
    decoder.forward.fused = FusedDecoder(decoder, kernels, fused_lora=fused_lora)
    return path


WAYS = ['plain-apart', 'plain-folded', 'triton-folded']
# Triton's interpreter is slow: recomputed layers are the harder case; the others are covered by the plain kernels.
CHECKPOINTED = [(way, again) for way in WAYS for again in (False, True) if again or not way.startswith('triton')]


@pytest.fixture(params=WAYS)
def way(request):
    name, folding = request.param.split('-')
    if name == 'triton' and triton_obstacle():
        pytest.skip(triton_obstacle())
    return (fused_kernels() if name == 'triton' else PLAIN), folding == 'folded'


def num_layers(way):
    """Two, except in the interpreter."""
    return 2 if way[0] is PLAIN else 1


@pytest.mark.parametrize('make', [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize(('way', 'checkpointing'), CHECKPOINTED, indirect=['way'])
def test_gradients_equal_float64(batch, way, checkpointing, make):
    model = with_adapter(quantise(make()))
    exact_loss, exact = step(dequantised(model), batch)
    _, stock = step(model, batch)
    if checkpointing:
        model.get_base_model().model.gradient_checkpointing_enable({'use_reentrant': False})
    force(model, way[0], fused_lora=way[1])
    loss, grads = step(model, batch)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert error(stock, exact) < 1e-4
    assert error(grads, exact) < 1e-4


# Of the second sample and the third: a step back to another position than 0, the same position again, a jump.
@pytest.mark.parametrize('first', [(3, 1), (6, 14), (9, 30)])
def test_a_sample_begins_wherever_positions_do_not_go_on_by_one(batch, first):
    spans = [(2, 5), (first[0], 9), (first[1], 3)]
    batch['position_ids'][0] = torch.cat([torch.arange(start, start + size) for start, size in spans])
    model = with_adapter(tiny_llama())
    exact_loss, exact = step(dequantised(model), batch)
    joined, _ = step(dequantised(model), batch | {'position_ids': torch.arange(17, device=DEVICE).repeat(2, 1)})
    force(model, PLAIN, fused_lora=False)
    loss, grads = step(model, batch)
    assert loss == pytest.approx(exact_loss, rel=1e-5) and loss != pytest.approx(joined, rel=1e-3)
    assert error(grads, exact) < 1e-4


@pytest.mark.parametrize('kept', [True, False])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_products_by_onednn_change_nothing(batch, kept, dropout, monkeypatch):
    """Weights cached as one matrix or dequantized layer by layer, with all sizes, some without an adapter."""
    if batch['input_ids'].is_cuda:
        pytest.skip('oneDNN multiplies on CPUs only')
    model = with_adapter(quantise(tiny_llama()), dropout=dropout, targets=['q_proj', 'v_proj', 'up_proj', 'down_proj'])
    path = enable_fused_training(model)
    groups = [group for layer in model.get_base_model().model.forward.fused.layers for group in layer.groups]
    assert path.reason_disabled == '14 of its 4-bit weights cached as floats' and all(
        g.cached is not None for g in groups
    )
    for group in groups:
        group.cached = group.cached if kept else None
    torch.manual_seed(3)
    loss, grads = step(model, batch)
    monkeypatch.setattr(cpu_gemm, '_MIN_MULTIPLICATIONS', 1)
    torch.manual_seed(3)
    other_loss, other = step(model, batch)
    exact_loss, exact = step(dequantised(model), batch)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert error(other, grads) < 1e-4
    if not dropout:
        assert other_loss == pytest.approx(exact_loss, rel=1e-5)
        assert error(other, exact) < 1e-4


def test_no_layer_returns_a_view(batch, monkeypatch):
    """oneDNN returns a view for an unusual number of rows, about which torch would warn under `fully_shard`."""
    if batch['input_ids'].is_cuda:
        pytest.skip('oneDNN multiplies on CPUs only')
    bases = []

    def spy(*args, **kwargs):
        out, kept = plain_forward(*args, **kwargs)
        bases.append(out._base)
        return out, kept

    plain_forward = layer.layer_forward
    monkeypatch.setattr(cpu_gemm, '_MIN_MULTIPLICATIONS', 1)
    monkeypatch.setattr(layer, 'layer_forward', spy)
    model = with_adapter(quantise(tiny_llama()))
    enable_fused_training(model)
    step(model, batch)
    assert bases == [None] * 2


def test_gradients_are_not_copied_where_there_is_room_beside_them(batch):
    """Copies: the attention output and the gradient of v in each layer, and the gradient of the last norm."""
    copies = []
    counting = replace(PLAIN, copy_rows=lambda x, out: copies.append(len(x)) or out.copy_(x))
    model = with_adapter(quantise(tiny_llama(layers=3)))
    force(model, counting, fused_lora=True)
    step(model, batch)
    assert len(copies) == 2 * 3 + 1


def test_plain_path_in_float64_is_exact(batch):
    model = dequantised(with_adapter(quantise(tiny_llama())))
    exact_loss, exact = step(model, batch)
    force(model, PLAIN, fused_lora=True)
    loss, grads = step(model, batch)
    assert loss == pytest.approx(exact_loss, rel=1e-8)  # transformers' norm computes in float32 whatever the dtype
    assert error(grads, exact) < 1e-6


def test_bfloat16_is_as_near_to_float64_as_the_stock_path(batch):
    model = with_adapter(quantise(tiny_llama(dtype=torch.bfloat16), torch.bfloat16))
    exact_loss, exact = step(dequantised(model), batch)
    stock_loss, stock = step(model, batch, dtype=torch.bfloat16)
    for folded in (False, True):
        force(model, PLAIN, fused_lora=folded)
        loss, grads = step(model, batch, dtype=torch.bfloat16)
        assert error(grads, exact) < 1.1 * error(stock, exact)
        assert abs(loss - exact_loss) < 2 * abs(stock_loss - exact_loss) + 1e-2 * exact_loss


@pytest.mark.parametrize(
    'targets',
    [['q_proj', 'v_proj'], ['k_proj', 'down_proj'], ['gate_proj'], ['o_proj', 'up_proj'], 'all-linear'],
)
def test_adapters_on_some_layers_only(batch, way, targets):
    model = with_adapter(quantise(tiny_llama(layers=num_layers(way), kv_heads=4, bias=False)), targets=targets)
    _, exact = step(dequantised(model), batch)
    force(model, way[0], fused_lora=way[1])
    assert error(step(model, batch)[1], exact) < 1e-4


def test_ranks_and_scalings_that_differ(batch, way):
    patterns = {'rank_pattern': {'k_proj': 4, 'up_proj': 16}, 'alpha_pattern': {'v_proj': 3, 'up_proj': 50}}
    model = with_adapter(quantise(tiny_llama(layers=num_layers(way))), **patterns)
    _, exact = step(dequantised(model), batch)
    force(model, way[0], fused_lora=way[1])
    assert error(step(model, batch)[1], exact) < 1e-4


@pytest.mark.parametrize(('way', 'checkpointing'), CHECKPOINTED, indirect=['way'])
def test_dropout_gradient_is_the_slope_of_the_loss(batch, way, checkpointing):
    """With dropout masks fixed by the seed, the loss changes along the gradient as the gradient predicts."""
    model = with_adapter(quantise(tiny_llama(layers=num_layers(way))), dropout=0.2)
    if checkpointing:
        model.get_base_model().model.gradient_checkpointing_enable({'use_reentrant': False})
    force(model, way[0], fused_lora=way[1])
    torch.manual_seed(3)
    first, grads = step(model, batch)
    torch.manual_seed(3)
    again, same = step(model, batch)
    other = float(loss_of(model, batch).detach())
    assert again == first and other != first
    assert all(torch.equal(grads[n], same[n]) for n in grads)
    parameters = dict(model.named_parameters())
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    length, losses = 2e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, grad in grads.items():
                parameters[name].add_((sign * length / norm * grad).float())
        torch.manual_seed(3)
        losses.append(float(loss_of(model, batch).detach()))
        with torch.no_grad():
            for name, grad in grads.items():
                parameters[name].sub_((sign * length / norm * grad).float())
    assert (losses[0] - losses[1]) / (2 * length) == pytest.approx(norm, rel=2e-2)


def test_all_ways_draw_the_same_masks(batch):
    results = []
    for kernels, folded in (
        (PLAIN, False),
        (PLAIN, True),
        *([(fused_kernels(), True)] if not triton_obstacle() else []),
    ):
        model = with_adapter(quantise(tiny_llama()), dropout=0.2)
        force(model, kernels, fused_lora=folded)
        torch.manual_seed(11)
        results.append(step(model, batch)[1])
    for grads in results[1:]:
        assert error(grads, results[0]) < 1e-4


def test_dropout_is_unbiased_in_the_mean(batch):
    """The mean loss over many masks is that of the model's own forward pass, to within both means' spread."""
    model = with_adapter(quantise(tiny_llama(layers=1)), dropout=0.5)
    with torch.no_grad():
        stock = torch.tensor([_loss(model, batch) for _ in range(200)])
        enable_fused_training(model)
        fast = torch.tensor([_loss(model, batch) for _ in range(200)])
    spread = float((stock.var() / 200 + fast.var() / 200).sqrt())
    assert abs(float(stock.mean() - fast.mean())) < 4 * spread
    assert 0.7 < float(fast.std() / stock.std()) < 1.4


def _loss(model, batch):
    logits = model(input_ids=batch['input_ids'], position_ids=batch['position_ids']).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits.float(), batch['labels'][:, 1:].flatten(), reduction='sum'))
