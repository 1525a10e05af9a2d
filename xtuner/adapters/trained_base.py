"""On which base an adapter was trained, and on which it runs: said wherever a model is handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.adapters.attach import Provenance


def base_note(provenance: Provenance | None, quantization: Mapping[str, Any] | None) -> str:
    """How the base that an adapter runs on differs from the one that it was trained on.

    Args:
        provenance: The adapter's.
        quantization: The `quantization` section that the base is loaded with; None: unquantised.

    Returns:
        One line; '' where the base is the trained one, or the adapter does not say.
    """
    if provenance is None:
        return ''
    trained, here = held(provenance.quantization), held(quantization)
    if trained == here:
        return ''
    return (f'the base is {here}, and the adapter was trained on it {trained}: answers may differ from those of '
            'training; `xtuner convert merge --base original` measures by how much')  # fmt: skip


def merged_note(provenance: Provenance | None) -> str:
    """On which base a merged model was merged, and how near it is to the trained one; '' where it is no merged one."""
    merged = provenance.merged if provenance else None
    if provenance is None or not isinstance(merged, Mapping):
        return ''
    trained = held(provenance.quantization)
    base = 'the values that training saw' if merged.get('base') == 'dequantized' else 'the published weights'
    agreement, kl, positions = (merged.get(key) for key in ('agreement', 'kl', 'positions'))
    if not (isinstance(agreement, float) and isinstance(kl, float) and isinstance(positions, int)):
        return f'merged on {base}; trained on the base {trained}'
    return (f'merged on {base}; against the base {trained} with its adapter, as trained: same likeliest token at '
            f'{100 * agreement:.1f} % of {positions} positions, KL {kl:.2g}')  # fmt: skip


def held(quantization: Mapping[str, Any] | None) -> str:
    """'in 4 bit (nf4)', 'in 8 bit' or 'unquantised'."""
    if not quantization:
        return 'unquantised'
    bits = quantization.get('bits', 4)
    return f'in {bits} bit' + (f' ({quantization.get("quant_type", "nf4")})' if bits == 4 else '')
