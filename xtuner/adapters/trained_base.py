"""Notes on the base that an adapter was trained on and the one that it runs on, for every handover of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.adapters.attach import Provenance


def base_note(provenance: Provenance | None, quantization: Mapping[str, Any] | None) -> str:
    """Describes how the base that an adapter runs on differs from the one that it was trained on.

    Args:
        provenance: The adapter's training metadata.
        quantization: The `quantization` section that the base is loaded with; None: unquantized.

    Returns:
        One line; '' if both are the same, or the adapter does not record it.
    """
    if provenance is None:
        return ''
    trained, here = precision_text(provenance.quantization), precision_text(quantization)
    if trained == here:
        return ''
    return (f'the base is {here}, but the adapter was trained with it {trained}: answers may differ from those in '
            'training; `xtuner convert merge --base original` measures the difference')  # fmt: skip


def merged_note(provenance: Provenance | None) -> str:
    """Describes the base of a merged model and its agreement with the trained model; '' for any other model."""
    merged = provenance.merged if provenance else None
    if provenance is None or not isinstance(merged, Mapping):
        return ''
    trained = precision_text(provenance.quantization)
    base = 'the values used in training' if merged.get('base') == 'dequantized' else 'the published weights'
    agreement, kl, positions = (merged.get(key) for key in ('agreement', 'kl', 'positions'))
    if not (isinstance(agreement, float) and isinstance(kl, float) and isinstance(positions, int)):
        return f'merged into {base}; trained with the base {trained}'
    return (f'merged into {base}; compared with the base {trained} plus adapter, as trained: same likeliest token at '
            f'{100 * agreement:.1f} % of {positions} positions, KL {kl:.2g}')  # fmt: skip


def precision_text(quantization: Mapping[str, Any] | None) -> str:
    """'in 4 bit (nf4)', 'in 8 bit' or 'unquantized'."""
    if not quantization:
        return 'unquantized'
    bits = quantization.get('bits', 4)
    return f'in {bits} bit' + (f' ({quantization.get("quant_type", "nf4")})' if bits == 4 else '')
