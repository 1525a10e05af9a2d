"""Loads a tokenizer from a folder or a hub id, without importing model code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xtuner.dataset.templates.template_probe import check_template_files
from xtuner.errors import ModelError, one_line
from xtuner.model.config_file import check_tokenizer_class
from xtuner.model.families.internlm.tokenization import PREFIX_KEY, InternLMTokenizer
from xtuner.model.families.internlm2.tokenization import InternLM2Tokenizer
from xtuner.model.families.internlm3.tokenization import SPACES_KEY, InternLM3Tokenizer
from xtuner.model.hub import read_json, resolve_model
from xtuner.model.load_config import load_config
from xtuner.utils.fields import Field, check_fields
from xtuner.utils.files import MAX_BYTES, check_regular, read_object

logger = logging.getLogger('xtuner')

TOKENIZERS = {'internlm': InternLMTokenizer, 'internlm2': InternLM2Tokenizer, 'internlm3': InternLM3Tokenizer}
_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')
_JSON_FILES = {
    'tokenizer_config.json': MAX_BYTES, 'tokenizer.json': 512 * 2**20, 'vocab.json': MAX_BYTES,
    'special_tokens_map.json': MAX_BYTES, 'added_tokens.json': MAX_BYTES, 'chat_template.json': MAX_BYTES,
    'processor_config.json': MAX_BYTES, 'preprocessor_config.json': MAX_BYTES,
}  # fmt: skip
# Path arguments of tokenizer classes, which transformers determines itself. Its older versions saved the paths at which
# the files were when they were written.
_SAVED_PATHS = ('tokenizer_file', 'vocab_file', 'merges_file', 'spm_file')
_REJECTED = ('init_inputs', 'fast_tokenizer_files', 'added_tokens_file', 'gguf_file')
_SIDE = Field(str | None, allowed=('left', 'right'))
_TOKEN = Field(str | dict[str, Any] | None)
_FIELDS = {
    'tokenizer_config.json': {
        **dict.fromkeys(('bos_token', 'eos_token', 'pad_token', 'unk_token', 'sep_token', 'cls_token', 'mask_token'),
                        _TOKEN),
        'auto_map': Field(dict[str, Any] | list[Any] | None),
        'added_tokens_decoder': Field(dict[str, dict[str, Any]] | None),
        'additional_special_tokens': Field(list[str | dict[str, Any]] | None),
        'extra_special_tokens': Field(dict[str, Any] | list[Any] | None),
        'chat_template': Field(str | list[Any] | dict[str, Any] | None),
        'model_max_length': Field(float | None, minimum=1, finite=False),
        'add_bos_token': Field(bool | None), 'add_eos_token': Field(bool | None),
        'add_prefix_space': Field(bool | None), 'clean_up_tokenization_spaces': Field(bool | None),
        'padding_side': _SIDE, 'truncation_side': _SIDE,
        'model_input_names': Field(list[str] | None), 'backend': Field(str | None),
    },
    'tokenizer.json': {
        'model': Field(dict[str, Any]), 'added_tokens': Field(list[dict[str, Any]] | None),
        **dict.fromkeys(('normalizer', 'pre_tokenizer', 'post_processor', 'decoder', 'truncation', 'padding'),
                        Field(dict[str, Any] | None)),
    },
}  # fmt: skip


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Args:
        path: A folder, a hub id or `modelscope:OWNER/NAME`.
        revision: Revision of a hub model; None uses the latest.
        trust_remote_code: Whether a tokenizer unknown to transformers may run its own code.

    Raises:
        ModelError: There is none, or it needs remote code.
    """
    folder = resolve_model(path, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    if not any((folder / name).exists() for name in _FILES) and not trust_remote_code:
        raise ModelError(f'{folder} contains no tokenizer: none of {", ".join(_FILES)} exists')
    settings = _read_settings(folder)
    native = _native_tokenizer(folder, settings)
    foreign = native is None and _names_code(settings)
    if foreign and not trust_remote_code and not (folder / 'tokenizer.json').is_file():
        kind = settings.get('tokenizer_class', 'its tokenizer')
        raise ModelError(f'{folder}: {kind} is not supported natively and needs code from the model; '
                         'pass --trust-remote-code to run that code')  # fmt: skip
    check_template_files(folder, settings)
    overrides = _overrides(folder, settings)
    try:
        if native is not None:
            return native.from_pretrained(folder, **overrides)
        from xtuner.model.families.auto import register  # imported late, since it imports the models' code

        register()
        config = _config(folder, trust_remote_code)
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code, **overrides)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f'{folder}: the tokenizer cannot be loaded: {one_line(error)}') from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """Validates all tokenizer files and returns the content of `tokenizer_config.json`, empty if there is none.

    transformers passes every key to the tokenizer's class; the file must not decide which files or class are loaded.

    Raises:
        ModelError: A file is irregular, too large or nested too deeply, or a field has a wrong type or names files.
    """
    for name, most in _JSON_FILES.items():
        if (path := folder / name).exists() or path.is_symlink():
            content = read_object(path, ModelError, max_bytes=most)
            check_fields(content, _FIELDS.get(name, {}), path, ModelError)
    for name in ('tokenizer.model', 'vocab.txt', 'merges.txt', 'chat_template.jinja'):
        if (path := folder / name).exists() or path.is_symlink():
            check_regular(path, ModelError)
    path = folder / 'tokenizer_config.json'
    settings = read_json(path) if path.is_file() else {}
    check_tokenizer_class(settings.get('tokenizer_class'), path)
    for name in _REJECTED:
        if settings.get(name):
            raise ModelError(f'{path}: `{name}` is rejected because it names other files; remove it')
    return settings


def _names_code(settings: dict[str, Any]) -> bool:
    """Whether `auto_map` names a tokenizer's code; formerly a list of the slow and the fast class."""
    named = settings.get('auto_map') or {}
    return any(named) if isinstance(named, list) else bool(named.get('AutoTokenizer'))


def _overrides(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments that override those of `tokenizer_config.json`: no file paths, and a default for missing sides."""
    paths = [name for name in _SAVED_PATHS if name in settings]
    if paths:
        logger.debug('%s: ignoring these paths of tokenizer_config.json: %s', folder, ', '.join(paths))
    sides = [name for name in ('padding_side', 'truncation_side') if settings.get(name, '') is None]
    return dict.fromkeys(paths) | dict.fromkeys(sides, 'right')


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """The validated model config, which transformers would read without validation; None if remote code may run."""
    if not (folder / 'config.json').exists():
        return PreTrainedConfig()
    try:
        return load_config(folder, weights=False)
    except ModelError:
        if trust_remote_code:
            return None
        content = read_json(folder / 'config.json')
        if isinstance(content.get('model_type'), str) and content['model_type'] not in CONFIG_MAPPING:
            return PreTrainedConfig()  # the tokenizer of an unknown model may be known
        raise


def _native_tokenizer(folder: Path, settings: dict[str, Any]) -> type[InternLMTokenizer] | None:
    """Selects this package's tokenizer class for a folder; None: one of transformers'."""
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
