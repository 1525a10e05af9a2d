"""Which kernel computes a pack, by GPU generation."""

from __future__ import annotations

import pytest
import torch

from xtuner.fused import attention
from xtuner.fused.attention import attention_for

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])


def packed(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *, head_size: int = 16) -> bool:
    """Whether FlashAttention would be used for a half-precision pack on a GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
    return attention._has_flash_attention(torch.device('cuda'), head_size)


@pytest.mark.parametrize(('capability', 'expected'), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flash_attention_from_ampere_on(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed(capability, monkeypatch) is expected
    assert not attention._has_flash_attention(torch.device('cpu'), 16)


@pytest.mark.parametrize(('head_size', 'expected'), [(128, True), (256, True), (264, False), (20, False)])
def test_flash_attention_for_the_head_sizes_that_it_has(
    head_size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed((9, 0), monkeypatch, head_size=head_size) is expected


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_pack_before_ampere_is_computed_sample_by_sample(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for a T4, run on the CPU: only the selection queries the GPU."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (7, 5))
    chosen = attention_for(POSITIONS, 1, 8, device=torch.device('cuda'), dtype=dtype, head_size=16)
    assert chosen.offsets is None and chosen.starts == [0, 3, 7, 8]
    assert chosen.graph_key is None  # CUDA graphs are not recorded: the samples' lengths differ from batch to batch
    q = torch.randn(8, 4, 16, dtype=dtype)
    k, v = torch.randn(2, 8, 2, 16, dtype=dtype)
    out = chosen.forward(q, k, v, 0.25)
    for a, b in ((0, 3), (3, 7), (7, 8)):
        alone = attention_for(None, 1, b - a, device=torch.device('cpu'), dtype=dtype, head_size=16)
        assert torch.equal(out[a:b], alone.forward(q[a:b], k[a:b], v[a:b], 0.25))
