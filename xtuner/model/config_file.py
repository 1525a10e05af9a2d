"""Validates an untrusted `config.json` before it reaches transformers.

transformers sets every key of the file on the config, resolves some as names of code, and downloads what others name.
Here only fields that the config's class declares are used; undeclared numbers and booleans are kept, because models
read some of them (`head_dim`) and they cannot name anything. The other keys are treated as follows:

    attn_implementation, experts_implementation           dropped: may name a kernel of the hub
    auto_map, custom_generate                             dropped unless --trust-remote-code: name code files
    kernel_config, use_kernels, fusion_config             dropped: kernels of the hub, patches of classes
    transformers_weights, configuration_files, gguf_file  dropped: name other files
    backbone, use_pretrained_backbone, ...                dropped: name a model of the hub
    distributed_config, per_layer_config                  dropped: structure of the model's construction
    return_dict, output_*, is_encoder_decoder, ...        dropped: change what a model returns
    _ANYTHING, and an attribute of the class that is not  dropped: would override it
        a field, such as `attribute_map` or `to_dict`
    dtype, torch_dtype, *_dtype                           looked up in torch: rejected unless a dtype, 'torch.' stripped
    quantization_config.quant_method                      rejected unless bitsandbytes: others load kernels or import
    quantization_config.llm_int8_skip_modules             regular expressions: rejected unless plain names
    tokenizer_class                                       looked up in transformers: rejected unless a tokenizer's name
    model_type, architectures, hidden_act, *_type         looked up in transformers' own tables: unknown ones are errors

Sizes are checked before anything is built, and compared with the weights by `xtuner.model.check`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xtuner.errors import ModelError, one_line
from xtuner.utils.fields import Field, check_fields, shown

logger = logging.getLogger('xtuner')

_DROPPED = frozenset((
    'attn_implementation', 'experts_implementation', 'auto_map', 'custom_generate', 'kernel_config', 'use_kernels',
    'fusion_config', 'transformers_weights', 'configuration_files', 'gguf_file', 'backbone', 'backbone_kwargs',
    'use_pretrained_backbone', 'use_timm_backbone', 'distributed_config', 'per_layer_config', 'name_or_path',
    'transformers_version', 'return_dict', 'use_return_dict', 'output_hidden_states', 'output_attentions',
    'is_encoder_decoder', 'torchscript', 'chunk_size_feed_forward',
))  # fmt: skip
_ID = Field(int | list[int] | None, minimum=-(2**31), maximum=2**31 - 1)
_SIZES = {
    'vocab_size': Field(Any, minimum=1, maximum=2**24),
    'hidden_size': Field(Any, minimum=1, maximum=2**20),
    'intermediate_size': Field(Any, minimum=0, maximum=2**24),
    'num_hidden_layers': Field(Any, minimum=1, maximum=1024),
    'num_attention_heads': Field(Any, minimum=1, maximum=2**16),
    'num_key_value_heads': Field(Any, minimum=1, maximum=2**16),
    'head_dim': Field(Any, minimum=1, maximum=2**16),
    'max_position_embeddings': Field(Any, minimum=1, maximum=2**31 - 1),
    'bos_token_id': _ID, 'eos_token_id': _ID, 'pad_token_id': _ID,
}  # fmt: skip
_OTHER_SIZE = re.compile(r'(num|n)_\w+|\w+_(size|dim|rank|heads|experts|embeddings|positions)')
_OTHER_FIELD = Field(Any, minimum=-1, maximum=2**31 - 1)
_NUM_LAYERS = re.compile(r'num_\w*layers|n_layers?|((en|de)coder_)?layers')  # counts; `feature_layer` is an index
_LAYERS_FIELD = Field(Any, minimum=-1, maximum=1024)
_ANY_NUMBER = Field(Any, minimum=-(2**63), maximum=2**63 - 1, finite=False)
_NON_FINITE = {'Infinity': math.inf, '-Infinity': -math.inf, 'NaN': math.nan}  # as written by transformers 5
_DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_TOKENIZER = re.compile(r'(?!Auto)\w*(Tokenizer|Backend)(Fast)?')
_QUANTIZATION = {
    'load_in_4bit': Field(bool), '_load_in_4bit': Field(bool),
    'load_in_8bit': Field(bool), '_load_in_8bit': Field(bool),
    'bnb_4bit_quant_type': Field(str, allowed=('nf4', 'fp4')),
    'bnb_4bit_use_double_quant': Field(bool),
    'llm_int8_threshold': Field(float), 'llm_int8_has_fp16_weight': Field(bool),
    'llm_int8_skip_modules': Field(list[str] | None),
    'llm_int8_enable_fp32_cpu_offload': Field(bool),
}  # fmt: skip
_PLAIN_NAME = re.compile(r'[\w.]{1,256}')


def make_config(
    content: Mapping[str, Any], path: Path, *, trust_remote_code: bool = False, weights: bool = True
) -> Any:
    """Builds transformers' config from a file's content, without anything that could download, import or override.

    Args:
        content: The JSON object.
        path: Its file, for error messages; its folder becomes the config's `name_or_path`.
        trust_remote_code: Whether quantization methods other than bitsandbytes are allowed.
        weights: Whether the weights will be loaded; False drops the quantization settings.

    Raises:
        ModelError: A field has a wrong type or size, names something disallowed, or conflicts with others.
    """
    kind = content['model_type']
    if kind == 'mistral' and 'layer_types' in content:  # as transformers' AutoConfig does
        kind = 'ministral'
    cls = CONFIG_MAPPING[kind]
    clean = _without_code(_decoded(content), cls)
    if not weights:
        clean = _without_quantization(clean)
    _warn_about_kernels(content, path)
    _check(clean, cls, path, '')
    if not trust_remote_code:
        _check_quantization(clean, path)
    try:
        config = cls.from_dict(dict(clean), name_or_path=str(path.parent))
        _remove_undeclared(config, clean)
        text = config.get_text_config()
    except Exception as error:  # transformers' code with untrusted values
        raise ModelError(f'{path}: {one_line(error)}') from error
    if trust_remote_code and 'auto_map' in content:
        config.auto_map = content['auto_map']
    if not isinstance(text, PreTrainedConfig):
        raise ModelError(f'{path}: the text config must be a dict, got {shown(text)}')
    _check_consistency(text, path)
    return config


def check_tokenizer_class(name: Any, path: Path) -> None:
    """Raises ModelError if `tokenizer_class` is not a tokenizer's name, since transformers would resolve it."""
    if name is not None and not (isinstance(name, str) and _TOKENIZER.fullmatch(name)):
        raise ModelError(f"{path}: `tokenizer_class` must be a tokenizer's name, got {shown(name)}")


def _without_code(content: Mapping[str, Any], cls: type[PreTrainedConfig] | None) -> dict[str, Any]:
    """The content without dropped keys, at any depth."""
    names = {field.name for field in dataclasses.fields(cls)} if cls else set()
    kept = {}
    for key, value in content.items():
        allowed = '_load_in_4bit', '_load_in_8bit'  # written by transformers in a quantization_config
        if key in _DROPPED or (key.startswith('_') and key not in allowed):
            continue
        if cls is not None and key not in names and key != 'model_type' and _overrides_attribute(cls, key):
            continue
        kept[key] = _without_code(value, None) if isinstance(value, dict) else value
    return kept


def _decoded(value: Any, name: str = '') -> Any:
    """The content with numbers for `{"__float__": "Infinity"}`, and dtypes without the `torch.` prefix."""
    if isinstance(value, dict):
        if value.keys() == {'__float__'} and (text := str(value['__float__'])) in _NON_FINITE:
            return _NON_FINITE[text]
        return {key: _decoded(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.removeprefix('torch.') if isinstance(value, str) and name.endswith('dtype') else value


def _without_quantization(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key != 'quantization_config'
    }


def _overrides_attribute(cls: type, key: str) -> bool:
    """Whether the class has an attribute of this name that is not a property, such as a method."""
    attribute = inspect.getattr_static(cls, key, None)
    return attribute is not None and not isinstance(attribute, property)


def _warn_about_kernels(content: Mapping[str, Any], path: Path) -> None:
    for name, value in _texts(content, ''):
        if 'implementation' in name and '/' in value:
            logger.warning('%s: `%s` names %s, a hub kernel, which is ignored', path, name, shown(value))


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yields every string in nested objects with its dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f'{name}.{key}' if name else key)
    elif isinstance(value, str):
        yield name, value


def _check(content: Mapping[str, Any], cls: type[PreTrainedConfig] | None, path: Path, where: str) -> None:
    """Checks sizes, dtypes and quantization, in this object and in nested ones."""
    aliases = getattr(cls, 'attribute_map', {})
    for name, value in content.items():
        full = f'{where}{name}'
        if name.endswith('dtype') and value is not None and not (isinstance(value, str) and value in _DTYPES):
            raise ModelError(f"{path}: `{full}` must be a dtype's name such as 'bfloat16', got {shown(value)}")
        for written, canonical in [(name, name), *aliases.items()]:
            if written == name and (fault := _field_of(name, canonical).fault(full, value)):
                raise ModelError(f'{path}: {fault}')
        if isinstance(value, dict):
            _check(value, None, path, f'{full}.')
    check_tokenizer_class(content.get('tokenizer_class'), path)


def _field_of(name: str, canonical: str) -> Field:
    if canonical in _SIZES:
        return _SIZES[canonical]
    if _NUM_LAYERS.fullmatch(name):
        return _LAYERS_FIELD
    return _OTHER_FIELD if _OTHER_SIZE.fullmatch(name) else _ANY_NUMBER


def _check_quantization(content: Mapping[str, Any], path: Path, where: str = '') -> None:
    """Checks each `quantization_config`, in this object and in nested ones."""
    for name, value in content.items():
        full = f'{where}{name}'
        if name != 'quantization_config':
            if isinstance(value, dict):
                _check_quantization(value, path, f'{full}.')
            continue
        if not isinstance(value, (dict, type(None))):
            raise ModelError(f'{path}: `{full}` must be a dict, got {shown(value)}')
        method = (value or {}).get('quant_method', 'bitsandbytes')
        if method != 'bitsandbytes':
            raise ModelError(
                f'{path}: `{full}.quant_method` is {shown(method)}, whose kernels and packages are loaded only with '
                '--trust-remote-code; use unquantized weights, or weights quantized by bitsandbytes'
            )
        check_fields(value or {}, _QUANTIZATION, f'{path}: in `{full}`', ModelError)
        for module in (value or {}).get('llm_int8_skip_modules') or ():
            if not _PLAIN_NAME.fullmatch(module):
                raise ModelError(f'{path}: `{full}.llm_int8_skip_modules` must be module names, got {shown(module)}')


def _remove_undeclared(config: PreTrainedConfig, content: Mapping[str, Any]) -> None:
    """Removes strings, lists and objects from a config that its class neither declares nor sets by itself.

    Some classes set fields that they do not declare, such as gpt_neo's `attention_layers`, and write them.
    """
    undeclared = _undeclared(config, content)
    if not undeclared:
        return
    reference = _build(type(config), _without(content, undeclared)) or _build(type(config), {})
    removed = [keys for keys in undeclared if not _has(reference, keys)]
    for keys in removed:
        delattr(functools.reduce(getattr, keys[:-1], config), keys[-1])
    if removed:
        names = ', '.join(map('.'.join, removed))
        logger.debug('%s does not declare these fields of config.json: %s', type(config).__name__, names)


def _build(cls: type[PreTrainedConfig], content: dict[str, Any]) -> PreTrainedConfig | None:
    try:
        return cls.from_dict(content)
    except Exception as error:  # the class may require what was removed
        logger.debug('%s cannot be built without undeclared fields: %s', cls.__name__, one_line(error))
        return None


def _undeclared(config: PreTrainedConfig, content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the key paths of strings, lists and objects from the file that are set on the config undeclared."""
    declared = {field.name for field in dataclasses.fields(config)} | {'model_type', 'quantization_config'}
    paths: list[tuple[str, ...]] = []
    for key, value in content.items():
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            paths += [(key, *keys) for keys in _undeclared(inner, value)]
        elif key in vars(config).keys() - declared and isinstance(value, (str, list, dict)):
            paths.append((key,))
    return paths


def _without(content: Mapping[str, Any], paths: list[tuple[str, ...]]) -> dict[str, Any]:
    """The content without these fields, as a new object, since transformers may modify its argument."""
    kept = {}
    for key, value in content.items():
        inner = [keys[1:] for keys in paths if keys[0] == key]
        if () not in inner:
            kept[key] = _without(value, inner) if isinstance(value, dict) else value
    return kept


def _has(config: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if key not in getattr(config, '__dict__', {}):
            return False
        config = vars(config)[key]
    return True


def _check_consistency(text: PreTrainedConfig, path: Path) -> None:
    """Checks consistency between fields that would otherwise fail an assertion in torch."""
    heads, kv_heads = (_value(text, name) for name in ('num_attention_heads', 'num_key_value_heads'))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ModelError(
            f'{path}: `num_attention_heads` ({heads}) is not a multiple of `num_key_value_heads` ({kv_heads})'
        )
    pad, vocab_size = _value(text, 'pad_token_id'), _value(text, 'vocab_size')
    if isinstance(pad, int) and isinstance(vocab_size, int) and not -vocab_size <= pad < vocab_size:
        logger.warning('%s: `pad_token_id` (%s) is not below `vocab_size` (%s) and is ignored', path, pad, vocab_size)
        text.pad_token_id = None


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field's value as in the file; a class whose layers differ raises an error when asked for a single value."""
    return vars(config).get(config.attribute_map.get(name, name))
