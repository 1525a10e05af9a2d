"""A stranger's `config.json`: what of it reaches transformers.

transformers sets every key of the file on the config, looks some up as names of code, and fetches what others name.
Here only fields that the config's class declares are used; undeclared numbers and truth values stay, since models read
some of them (`head_dim`) and they name nothing. What becomes of the rest:

    attn_implementation, experts_implementation           dropped: may name a kernel of the hub
    auto_map, custom_generate                             dropped, but with --trust-remote-code: name files of code
    kernel_config, use_kernels, fusion_config             dropped: kernels of the hub, patches of classes
    transformers_weights, configuration_files, gguf_file  dropped: name other files
    backbone, use_pretrained_backbone, ...                dropped: name a model of the hub
    distributed_config, per_layer_config                  dropped: how and of what a model is built
    return_dict, output_*, is_encoder_decoder, ...        dropped: change what a model returns
    _ANYTHING, and an attribute of the class that is no   dropped: would replace it
        field, such as `attribute_map` or `to_dict`
    dtype, torch_dtype, *_dtype                           looked up in torch: refused unless a dtype ('torch.' is cut)
    quantization_config.quant_method                      refused unless bitsandbytes: others fetch kernels or import
    quantization_config.llm_int8_skip_modules             regular expressions: refused unless plain names
    tokenizer_class                                       looked up in transformers: refused unless a tokenizer's name
    model_type, architectures, hidden_act, *_type         looked up in transformers' own tables: unknown ones are errors

Sizes are bounded before anything is built, and compared with the weights by `xtuner.model.check`.
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
_NON_FINITE = {'Infinity': math.inf, '-Infinity': -math.inf, 'NaN': math.nan}  # as transformers 5 writes them
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
    """transformers' config of a file's content, without what could fetch, import or replace anything.

    Args:
        content: The JSON object.
        path: Its file, for messages; its folder becomes the config's `name_or_path`.
        trust_remote_code: Whether weights may be quantised by other packages than bitsandbytes.
        weights: Whether the weights will be loaded; False leaves out how they are quantised.

    Raises:
        ModelError: a field is of a wrong type or size, names what is refused, or does not fit the others.
    """
    kind = content['model_type']
    if kind == 'mistral' and 'layer_types' in content:  # as transformers' AutoConfig takes it
        kind = 'ministral'
    cls = CONFIG_MAPPING[kind]
    clean = _without_code(_decoded(content), cls)
    if not weights:
        clean = _without_quantization(clean)
    _warn_of_kernels(content, path)
    _check(clean, cls, path, '')
    if not trust_remote_code:
        _check_quantization(clean, path)
    try:
        config = cls.from_dict(dict(clean), name_or_path=str(path.parent))
        _remove_undeclared(config, clean)
        text = config.get_text_config()
    except Exception as error:  # transformers' code, given a stranger's values
        raise ModelError(f'{path}: {one_line(error)}') from error
    if trust_remote_code and 'auto_map' in content:
        config.auto_map = content['auto_map']
    if not isinstance(text, PreTrainedConfig):
        raise ModelError(f'{path}: its text config must be a dict, got {shown(text)}')
    _check_made(text, path)
    return config


def check_tokenizer_class(name: Any, path: Path) -> None:
    """Raises ModelError where `tokenizer_class` is no tokenizer's name: transformers would look it up in itself."""
    if name is not None and not (isinstance(name, str) and _TOKENIZER.fullmatch(name)):
        raise ModelError(f"{path}: `tokenizer_class` must be a tokenizer's name, got {shown(name)}")


def _without_code(content: Mapping[str, Any], cls: type[PreTrainedConfig] | None) -> dict[str, Any]:
    """The content without what is dropped, at any depth."""
    names = {field.name for field in dataclasses.fields(cls)} if cls else set()
    kept = {}
    for key, value in content.items():
        own = '_load_in_4bit', '_load_in_8bit'  # of a quantization_config, as transformers writes it
        if key in _DROPPED or (key.startswith('_') and key not in own):
            continue
        if cls is not None and key not in names and key != 'model_type' and _replaces(cls, key):
            continue
        kept[key] = _without_code(value, None) if isinstance(value, dict) else value
    return kept


def _decoded(value: Any, name: str = '') -> Any:
    """The content with numbers for `{"__float__": "Infinity"}`, and dtypes without `torch.` in front."""
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


def _replaces(cls: type, key: str) -> bool:
    """Whether the class has an attribute of this name that is no property, such as a method."""
    found = inspect.getattr_static(cls, key, None)
    return found is not None and not isinstance(found, property)


def _warn_of_kernels(content: Mapping[str, Any], path: Path) -> None:
    for name, value in _texts(content, ''):
        if 'implementation' in name and '/' in value:
            logger.warning('%s: `%s` names %s, a kernel of the hub; it is not used', path, name, shown(value))


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yields every text of nested objects with its dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f'{name}.{key}' if name else key)
    elif isinstance(value, str):
        yield name, value


def _check(content: Mapping[str, Any], cls: type[PreTrainedConfig] | None, path: Path, where: str) -> None:
    """Checks sizes, dtypes and quantisation, in this object and in those within it."""
    same = getattr(cls, 'attribute_map', {})
    for name, value in content.items():
        full = f'{where}{name}'
        if name.endswith('dtype') and value is not None and not (isinstance(value, str) and value in _DTYPES):
            raise ModelError(f"{path}: `{full}` must be a dtype's name such as 'bfloat16', got {shown(value)}")
        for written, canonical in [(name, name), *same.items()]:
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
    """Looks at each `quantization_config`, in this object and in those within it."""
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
                '--trust-remote-code; use weights that are not quantised, or quantised by bitsandbytes'
            )
        check_fields(value or {}, _QUANTIZATION, f'{path}: in `{full}`', ModelError)
        for module in (value or {}).get('llm_int8_skip_modules') or ():
            if not _PLAIN_NAME.fullmatch(module):
                raise ModelError(f'{path}: `{full}.llm_int8_skip_modules` must be module names, got {shown(module)}')


def _remove_undeclared(config: PreTrainedConfig, content: Mapping[str, Any]) -> None:
    """Takes texts, lists and objects off a config that its class neither declares nor sets without the file's value.

    Some classes set fields that they do not declare, such as gpt_neo's `attention_layers`, and write them.
    """
    found = _undeclared(config, content)
    if not found:
        return
    own = _built(type(config), _without(content, found)) or _built(type(config), {})
    removed = [keys for keys in found if not _has(own, keys)]
    for keys in removed:
        delattr(functools.reduce(getattr, keys[:-1], config), keys[-1])
    if removed:
        names = ', '.join(map('.'.join, removed))
        logger.debug('%s does not know these fields of config.json: %s', type(config).__name__, names)


def _built(cls: type[PreTrainedConfig], content: dict[str, Any]) -> PreTrainedConfig | None:
    try:
        return cls.from_dict(content)
    except Exception as error:  # the class may need what was left out
        logger.debug('%s is not built without undeclared fields: %s', cls.__name__, one_line(error))
        return None


def _undeclared(config: PreTrainedConfig, content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The texts, lists and objects of the file that are on the config undeclared: each as its keys, from the top."""
    declared = {field.name for field in dataclasses.fields(config)} | {'model_type', 'quantization_config'}
    found: list[tuple[str, ...]] = []
    for key, value in content.items():
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            found += [(key, *keys) for keys in _undeclared(inner, value)]
        elif key in vars(config).keys() - declared and isinstance(value, (str, list, dict)):
            found.append((key,))
    return found


def _without(content: Mapping[str, Any], found: list[tuple[str, ...]]) -> dict[str, Any]:
    """The content without these fields; a new object, since transformers may change what it is given."""
    kept = {}
    for key, value in content.items():
        inner = [keys[1:] for keys in found if keys[0] == key]
        if () not in inner:
            kept[key] = _without(value, inner) if isinstance(value, dict) else value
    return kept


def _has(config: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if key not in getattr(config, '__dict__', {}):
            return False
        config = vars(config)[key]
    return True


def _check_made(text: PreTrainedConfig, path: Path) -> None:
    """Checks across fields what would be an assertion of torch."""
    heads, kv_heads = (_value(text, name) for name in ('num_attention_heads', 'num_key_value_heads'))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ModelError(
            f'{path}: `num_attention_heads` ({heads}) is no multiple of `num_key_value_heads` ({kv_heads})'
        )
    pad, words = _value(text, 'pad_token_id'), _value(text, 'vocab_size')
    if isinstance(pad, int) and isinstance(words, int) and not -words <= pad < words:
        logger.warning('%s: `pad_token_id` (%s) is not below `vocab_size` (%s); it is not used', path, pad, words)
        text.pad_token_id = None


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field as the file has it: a class whose layers differ refuses to be asked for one value."""
    return vars(config).get(config.attribute_map.get(name, name))
