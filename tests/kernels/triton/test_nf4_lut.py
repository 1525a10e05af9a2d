"""The look-up table of 4-bit codes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xtuner.kernels.triton.nf4_lut import WORD_SUM, table_words


def permuted(a, b, selector):
    """PTX's `prmt`: bytes of two words, picked by four codes; the fourth bit of a code repeats the byte's sign."""
    data = a.to_bytes(4, 'little') + b.to_bytes(4, 'little')
    codes = [(selector >> 4 * i) & 15 for i in range(4)]
    return int.from_bytes([(255 if data[c & 7] & 128 else 0) if c & 8 else data[c & 7] for c in codes], 'little')


def run_assembly(assembly, word, x, table):
    """The assembly of a word's sum, instruction by instruction, in float64."""
    known = {'$1': word} | {f'${2 + i}': v for i, v in enumerate(x)}
    known |= {f'${10 + i}': v & 0xFFFFFFFF for i, v in enumerate(table)}
    do = {
        'and.b32': lambda a, b: a & b, 'or.b32': lambda a, b: a | b, 'shr.u32': lambda a, b: a >> b,
        'prmt.b32': permuted, 'cvt.f32.f16': lambda a: float(np.uint16(a).view(np.float16)),
        'mul.f32': lambda a, b: a * b, 'fma.rn.f32': lambda a, b, c: a * b + c, 'mov.f32': lambda a: a,
    }  # fmt: skip
    for line in assembly.strip()[1:-1].split(';'):
        name, _, rest = line.strip().partition(' ')
        if name == 'mov.b32':
            source = known[rest.split('}, ')[1]]
            known |= {'u': source & 0xFFFF, 'v': source >> 16}
        elif name in do:
            target, *sources = rest.split(', ')
            known[target] = do[name](*(known[s] if s in known else int(s, 0) for s in sources))
        else:
            assert name in ('', '.reg'), name
    return known['$0']


@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
def test_the_assembly_picks_what_the_table_says(kind):
    """Triton's interpreter runs none, so it is run here."""
    functional = pytest.importorskip('bitsandbytes.functional')
    table = functional.get_4bit_type(kind, device='cpu')
    words, halves, draw = table_words(table), table.half().tolist(), random.Random(0)
    for _ in range(300):
        data, x = draw.randbytes(4), [draw.gauss(0, 1) for _ in range(8)]
        pairs = [(byte >> 4, byte & 15) for byte in data]
        expected = sum(halves[code] * value for code, value in zip([c for p in pairs for c in p], x, strict=True))
        got = run_assembly(WORD_SUM.value, int.from_bytes(data, 'little'), x, words)
        assert got == pytest.approx(expected, abs=1e-12)
