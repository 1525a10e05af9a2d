"""Weights on disk: every published layout reads the same; what is torn, missing or not weights is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xtuner.errors import ModelError
from xtuner.model.weights.reader import fingerprint, open_weights

TENSORS = {
    'model.embed.weight': torch.arange(2000 * 3, dtype=torch.float16).reshape(2000, 3),
    'model.norm.weight': torch.arange(7, dtype=torch.bfloat16),
    'head.weight': torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    'scalar': torch.tensor(3.0),
}
STRAY = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}


def write(folder: Path, layout: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Writes tensors as 'bin', 'old-bin', 'safetensors', 'bin-sharded' or 'safetensors-sharded'."""
    tensors = TENSORS if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    suffix = 'safetensors' if layout.startswith('safetensors') else 'bin'
    stem = 'model' if suffix == 'safetensors' else 'pytorch_model'

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        if suffix == 'safetensors':
            save_file(part, path)
        else:
            torch.save(part, path, _use_new_zipfile_serialization=layout != 'old-bin')

    if not layout.endswith('sharded'):
        save(tensors, folder / f'{stem}.{suffix}')
        return folder
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f'{stem}-{number:05d}-of-00002.{suffix}'
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
    return folder


LAYOUTS = ['bin', 'old-bin', 'safetensors', 'bin-sharded', 'safetensors-sharded']


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_reads_the_same(tmp_path: Path, layout: str) -> None:
    reader = open_weights(write(tmp_path, layout, TENSORS | STRAY))
    assert sorted(reader.names()) == sorted(TENSORS)  # the stray buffer is not a weight
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.rows(name), tensor)
        if tensor.dim():
            assert torch.equal(reader.rows(name, 1, 3), tensor[1:3])
            assert torch.equal(reader.rows(name, 1, 10**6), tensor[1:])
        assert bool(reader._ranges(reader.file(name))) == (layout != 'old-bin')  # read where it lies, not mapped
        assert torch.equal(reader.read(name), tensor)
        assert reader.file(name).is_file()


def test_fingerprint_knows_the_weights_and_not_their_layout(tmp_path: Path) -> None:
    same = {layout: fingerprint(open_weights(write(tmp_path / layout, layout))) for layout in LAYOUTS}
    same['stray'] = fingerprint(open_weights(write(tmp_path / 'stray', 'bin', TENSORS | STRAY)))
    assert len(set(same.values())) == 1
    for name in TENSORS:
        changed = {n: t.clone() for n, t in TENSORS.items()}
        changed[name].view(-1)[-1] *= -1
        other = fingerprint(open_weights(write(tmp_path / f'changed-{name}', 'safetensors', changed)))
        assert other not in same.values(), name
    renamed = {('other' if n == 'scalar' else n): t for n, t in TENSORS.items()}
    assert fingerprint(open_weights(write(tmp_path / 'renamed', 'bin', renamed))) not in same.values()


@pytest.mark.parametrize('layout', ['bin-sharded', 'safetensors-sharded'])
@pytest.mark.parametrize('damage', ['missing', 'truncated', 'lacking'])
def test_a_damaged_shard_is_named_with_a_tensor(tmp_path: Path, layout: str, damage: str) -> None:
    shard = next(write(tmp_path, layout).glob('*-00002-of-*'))
    if damage == 'missing':
        shard.unlink()
    elif damage == 'truncated':
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    else:
        first = shard.with_name(shard.name.replace('00002-of', '00001-of'))
        shard.write_bytes(first.read_bytes())
    message = {'missing': 'is missing', 'truncated': 'damaged or truncated', 'lacking': 'lacks tensor'}[damage]
    with pytest.raises(ModelError, match=rf"{shard.name}.* {message}.*'head.weight'"):
        open_weights(tmp_path)


def test_a_file_that_cannot_be_read_further_is_named(tmp_path: Path) -> None:
    """As on a disk that fails; a merge told so as if the folder that it writes were at fault."""
    reader = open_weights(write(tmp_path, 'safetensors'))

    class Failing(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, 'Input/output error')

    reader._raw[reader.file('head.weight'), threading.get_ident()] = Failing()
    with pytest.raises(ModelError, match=r'model\.safetensors cannot be read: Input/output error'):
        reader.rows('head.weight')


def test_a_tensor_the_index_forgot_is_found(tmp_path: Path) -> None:
    index = next(write(tmp_path, 'bin-sharded').glob('*.index.json'))
    weight_map = json.loads(index.read_text())['weight_map']
    del weight_map['scalar']
    index.write_text(json.dumps({'weight_map': weight_map}))
    assert 'scalar' in open_weights(tmp_path).names()


class Payload:
    def __reduce__(self) -> tuple:
        return (open, ('/tmp/xtuner-payload-ran', 'w'))


@pytest.mark.parametrize('new_format', [True, False])
def test_a_payload_is_refused_and_never_runs(tmp_path: Path, new_format: bool) -> None:
    content = TENSORS | {'evil': Payload()}
    torch.save(content, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelError, match=r'pytorch_model\.bin was rejected'):
        open_weights(tmp_path)
    assert not Path('/tmp/xtuner-payload-ran').exists()


def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / 'pytorch_model.bin')
    with pytest.raises(ModelError, match='not a plain dict of tensors'):
        open_weights(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps({'a': 1}))
    with pytest.raises(ModelError, match=r'was rejected|damaged'):
        open_weights(tmp_path)


def test_an_empty_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    """Where torch raises an error without a word."""
    (tmp_path / 'pytorch_model.bin').touch()
    with pytest.raises(ModelError, match=r'pytorch_model\.bin is damaged or truncated'):
        open_weights(tmp_path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='no such folder'):
        open_weights(tmp_path / 'absent')
    with pytest.raises(ModelError, match='contains no weights'):
        open_weights(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{}')
    with pytest.raises(ModelError, match=r'model\.safetensors\.index\.json cannot be read'):
        open_weights(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tensor 'nothing'"):
        open_weights(write(tmp_path, 'bin')).read('nothing')
