"""What the hostile cases begin with: a sound model, adapter, checkpoint, data set and config, all tiny."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = """
from peft import LoraConfig
from torch.optim import AdamW
model = dict(path='model', template='internlm_chat')
dataset = dict(source='data.jsonl', max_length=64)
optimizer = dict(type=AdamW, lr=1e-3)
adapter = dict(type=LoraConfig, r=4, lora_alpha=8, target_modules='all-linear')
schedule = dict(max_steps=1, accumulative_counts=1)
log = dict(trackers=[])
"""
CONVERTER = """
import pathlib, sys
pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_bytes(b'GGUF')
"""
TRAIN = ['train', 'config.py', '--work-dir', 'work']


def make_world(folder: Path, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Fills a folder; `run` runs a command line in it."""
    import torch
    from safetensors.torch import load_file

    from tests.convert.adapters import make_base, save_trained
    from tests.model.published import write_model, write_tokenizer
    from xtuner.adapters.attach import Provenance
    from xtuner.model.loading import load_tokenizer
    from xtuner.model.weights.reader import fingerprint, open_weights

    folder.mkdir(parents=True)
    base = make_base(folder / 'model')
    load_tokenizer(base).save_pretrained(base)
    digest = fingerprint(open_weights(base))
    adapter = folder / 'adapter'
    save_trained(base, adapter, target_modules=['q_proj', 'v_proj'])
    provenance = Provenance('model', digest, 'internlm_chat', 'fp32', {'bits': 4, 'quant_type': 'nf4'}, training={})
    provenance.write(adapter)
    provenance.write(base)
    write_tokenizer(write_model(folder / 'internlm', 'v2', 'safetensors'), 'InternLM2')
    tensors = {f'llm.{name}': tensor for name, tensor in load_file(adapter / 'adapter_model.safetensors').items()}
    torch.save({'state_dict': tensors}, folder / 'iter.pth')
    (folder / 'config.py').write_text(CONFIG)
    (folder / 'old.py').write_text(CONFIG.replace("'all-linear'", "['q_proj', 'v_proj']"))
    (folder / 'converter.py').write_text(CONVERTER)
    messages = [{'role': 'user', 'content': 'the cat'}, {'role': 'assistant', 'content': 'sat on the mat'}]
    (folder / 'data.jsonl').write_text((json.dumps({'messages': messages}) + '\n') * 8)
    done = run({'argv': TRAIN, 'folder': str(folder)})
    assert done['status'] == 0, done['err']
    shutil.move(folder / 'work', folder / 'run')


def write_manifest(checkpoint: Path) -> None:
    """A manifest that agrees with the files, as whoever makes a hostile checkpoint writes it."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != 'manifest.json']
    (checkpoint / 'manifest.json').write_text(json.dumps({
        path.name: {'bytes': path.stat().st_size, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }))  # fmt: skip
