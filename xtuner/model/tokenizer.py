"""From a folder or a hub id to a tokenizer; no model's code is imported for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from xtuner.dataset.template_probe import check_template_files
from xtuner.errors import ModelError, one_line
from xtuner.model.internlm.tokenization import PREFIX_KEY, InternLMTokenizer
from xtuner.model.internlm2.tokenization import InternLM2Tokenizer
from xtuner.model.internlm3.tokenization import SPACES_KEY, InternLM3Tokenizer
from xtuner.model.sources import read_json, resolve_model

TOKENIZERS = {'internlm': InternLMTokenizer, 'internlm2': InternLM2Tokenizer, 'internlm3': InternLM3Tokenizer}
_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: A folder, a hub id or `modelscope:OWNER/NAME`.
        revision: Of a hub model; None takes the newest.
        trust_remote_code: Whether a tokenizer that transformers does not know may run its own code.

    Raises:
        ModelError: there is none, or it needs remote code.
    """
    folder = resolve_model(path, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    if not any((folder / name).is_file() for name in _FILES) and not trust_remote_code:
        raise ModelError(f'{folder} holds no tokenizer: none of {", ".join(_FILES)} is there')
    settings = read_json(folder / 'tokenizer_config.json') if (folder / 'tokenizer_config.json').is_file() else {}
    own = _own_tokenizer(folder, settings)
    foreign = own is None and (settings.get('auto_map') or {}).get('AutoTokenizer')
    if foreign and not trust_remote_code and not (folder / 'tokenizer.json').is_file():
        kind = settings.get('tokenizer_class', 'its tokenizer')
        raise ModelError(f'{folder}: {kind} is not supported natively and needs code from the model; '
                         'pass --trust-remote-code to run that code')  # fmt: skip
    check_template_files(folder, settings)
    try:
        if own is not None:
            return own.from_pretrained(folder)
        from xtuner.model.loading import register  # a config may be of a model that transformers learns of there

        register()
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f'{folder}: the tokenizer cannot be loaded: {one_line(error)}') from error


def _own_tokenizer(folder: Path, settings: dict[str, Any]) -> type[InternLMTokenizer] | None:
    """Which of our tokenizers a folder is for; None: one of transformers' own."""
    if not (folder / 'tokenizer.model').is_file() and PREFIX_KEY not in settings:
        return None
    named = f'{settings.get("tokenizer_class", "")} {settings.get("auto_map", "")}'
    if 'InternLM3' in named or (PREFIX_KEY in settings and SPACES_KEY in settings):
        return InternLM3Tokenizer
    if 'InternLM' in named:
        return InternLM2Tokenizer if 'InternLM2' in named else InternLMTokenizer
    config = read_json(folder / 'config.json') if (folder / 'config.json').is_file() else {}
    if config.get('model_type') in TOKENIZERS:
        return TOKENIZERS[config['model_type']]
    bare = not settings and not config and not (folder / 'tokenizer.json').is_file()
    return InternLMTokenizer if PREFIX_KEY in settings or bare else None
