"""Recorded CUDA graphs: what they read."""

from __future__ import annotations

from xtuner.fused.enable import enable_fused_training


def test_recorded_graphs_look_at_every_tensor_that_they_read(model, batch):
    from xtuner.fused.cuda_graphs import signature
    from xtuner.fused.enable import _fused_decoder

    enable_fused_training(model)
    runs = []
    _fused_decoder(model)._run_layers = lambda x, these, parameters: runs.append(these) or x
    decoder = model.get_base_model().model
    decoder(input_ids=batch['input_ids'], position_ids=batch['position_ids'])
    before = signature(runs[0])
    layer = decoder.layers[1]
    for parameter in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
                      layer.self_attn.q_proj.base_layer.bias, layer.mlp.up_proj.base_layer.weight):  # fmt: skip
        old = parameter.data
        parameter.data = old.clone()
        assert signature(runs[0]) != before
        parameter.data = old
    assert signature(runs[0]) == before
