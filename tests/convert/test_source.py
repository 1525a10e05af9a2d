"""What a merge reads: bases that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.convert.adapters import make_base, save_trained
from xtuner.convert.merge import merge
from xtuner.errors import ModelError


def test_a_broken_file_of_the_base_is_found_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtuner.convert import merge as module

    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    (base / 'generation_config.json').write_text('{')
    written: list[Path] = []
    monkeypatch.setattr(module, 'write_weights', lambda folder, *_: written.append(folder))
    with pytest.raises(ModelError, match=r'generation_config.json cannot be read'):
        merge(str(base), tmp_path / 'adapter', tmp_path / 'out', verify=0)
    assert not written
    assert not (tmp_path / 'out').exists()


def test_a_base_that_is_stored_quantised_is_told_as_such(tmp_path: Path) -> None:
    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    config = json.loads((base / 'config.json').read_text())
    config['quantization_config'] = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}
    (base / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r'is stored quantized \(bitsandbytes\), but a merge needs float weights'):
        merge(str(base), tmp_path / 'adapter', tmp_path / 'out')
