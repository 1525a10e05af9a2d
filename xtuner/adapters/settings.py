"""Validates an untrusted `adapter_config.json` before it reaches peft.

peft passes every key to its config class. Only declared fields of the right type are used here; values that name code,
files, models or addresses, or that are regular expressions, are treated as follows:

    auto_mapping, revision                        dropped: a module to import, a hub revision
    base_model_name_or_path                       dropped: fetched when an adapter is saved; the caller knows the base
    megatron_core, megatron_config                rejected if set: the first is imported
    tokenizer_name_or_path, tokenizer_kwargs,     dropped, and prompt_tuning_init set to RANDOM: a tokenizer to fetch,
      prompt_tuning_init_text,                      with trust_remote_code among its arguments, or a file to load;
      prompt_tuning_init_state_dict_path            only a new adapter needs them
    adapters (XLORA), shadow_model (SHADOW)       types rejected: they load further models by name
    peft_type, task_type, bias, init_lora_weights looked up in peft's own tables
    target_modules, exclude_modules, layers_pattern, rank_pattern, alpha_pattern, modules_to_save, ...
               regular expressions: matched with a time limit before peft does
    r, num_virtual_tokens, ...                    sizes: at most the largest dimension in the weights
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xtuner.config.arguments import PATTERNS
from xtuner.errors import CheckpointError, ModelError, XTunerError, nearest, one_line
from xtuner.model.run_folder import ADAPTER_CONFIG
from xtuner.model.weights.reader import WeightReader, file_names, open_file
from xtuner.utils.fields import Field, check_fields, shown
from xtuner.utils.files import check_regular, read_object

SETTINGS_FILE = ADAPTER_CONFIG
WEIGHT_FILES = ('adapter_model.safetensors', 'adapter_model.bin')
PROMPT_INIT = ('prompt_tuning_init', 'prompt_tuning_init_text', 'prompt_tuning_init_state_dict_path',
               'tokenizer_name_or_path', 'tokenizer_kwargs')  # fmt: skip
"""Fields that only initialize a new prompt; a saved one has its values in the file."""
_DROPPED = ('auto_mapping', 'revision', 'base_model_name_or_path', 'megatron_core', 'runtime_config', 'peft_version',
            *PROMPT_INIT)  # fmt: skip
_REJECTED = ('megatron_config', 'arrow_config')
_REJECTED_TYPES = ('XLORA', 'SHADOW')
_SIZES = (
    'r', 'init_r', 'target_r', 'hybrid_r', 'num_virtual_tokens', 'token_dim', 'encoder_hidden_size', 'adapter_len',
    'num_vectors', 'vector_length', 'theta_d_length', 'n_frequency', 'subspace_rank', 'num_B', 'n_skills', 'n_tasks',
    'num_tasks', 'num_ranks', 'mini_r', 'u',
)  # fmt: skip
_MAX_LAYERS = 1024
_MIN_SIZE_LIMIT = 4096  # sizes up to here take negligible memory, whatever the weights contain
_REPEATS = re.compile(r'[*+{?]')
_PISSA = re.compile('pissa_niter_[0-9]{1,3}')  # each iteration takes time for each layer
_CPU_SECONDS = 2


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`: declared fields of the right types, without any that could fetch or import.

    Raises:
        CheckpointError: The file cannot be read, has an unknown or disallowed adapter type, or a wrong field.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / SETTINGS_FILE
    content = read_object(path, CheckpointError)
    kinds = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    allowed = tuple(kind for kind in kinds if kind not in _REJECTED_TYPES)
    kind = content.get('peft_type')
    if kind is None:
        raise CheckpointError(f'{path}: `peft_type` is missing')
    if kind not in allowed:
        raise CheckpointError(f'{path}: `peft_type` is {shown(kind)}, which is not a supported adapter type'
                              f'{nearest(str(kind)[:64], allowed)}')  # fmt: skip
    if named := next((name for name in _REJECTED if content.get(name)), None):
        raise CheckpointError(f'{path}: `{named}` is rejected because it names code or files; remove it')
    declared = _declared(kinds[kind])
    check_fields(content, declared, path, CheckpointError)
    if 'init_lora_weights' in content and 'init_lora_weights' in declared:
        _check_init(content['init_lora_weights'], typing.get_type_hints(kinds[kind])['init_lora_weights'], path)
    settings = {name: value for name, value in content.items() if name in declared and name not in _DROPPED}
    return settings | ({'prompt_tuning_init': 'RANDOM'} if 'prompt_tuning_init' in declared else {})


def adapter_settings(folder: Path, shapes: Iterable[tuple[int, ...]] | None = None) -> Any:
    """Returns peft's config of a saved adapter, with sizes checked against its weights.

    Args:
        folder: Contains the adapter's files.
        shapes: The shapes of its tensors; None reads them.

    Raises:
        CheckpointError: As `read_adapter_settings`, or the weights cannot be read or have other sizes.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path, settings = folder / SETTINGS_FILE, read_adapter_settings(folder)
    shapes = _shapes(folder) if shapes is None else shapes
    largest = max([_MIN_SIZE_LIMIT, *(size for shape in shapes for size in shape)])
    for name in _SIZES:
        check_fields(settings, {name: Field(Any, minimum=0, maximum=largest)}, path, CheckpointError)
    ranks = settings.get('rank_pattern') or {}
    # For AdaLoRA, a rank pattern says for each rank whether it is kept.
    rank = Field(list[bool]) if settings['peft_type'] == 'ADALORA' else Field(float, minimum=1, maximum=largest)
    check_fields(ranks, dict.fromkeys(ranks, rank), f'{path}: in `rank_pattern`', CheckpointError)
    if _replicated(settings) > _MAX_LAYERS:
        raise CheckpointError(f'{path}: `layer_replication` creates more than {_MAX_LAYERS} layers')
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[settings['peft_type']](**settings)
    except Exception as error:  # peft's code with untrusted values
        raise CheckpointError(f'{path}: {one_line(error)}') from error


def weights_file(folder: Path) -> Path:
    """Returns the file of an adapter's tensors; raises CheckpointError if there is none."""
    files = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not files:
        raise CheckpointError(f'{folder}: no adapter found ({WEIGHT_FILES[0]} is missing)')
    return files[0]


def check_patterns(
    settings: Mapping[str, Any], names: Iterable[str], where: str, error: type[XTunerError] = CheckpointError
) -> None:
    """Matches the regular expressions of a peft config against a model's module names, with a time limit.

    Nested repeats can take exponential time and matching cannot be interrupted. Another process therefore tries first
    and is killed at the limit; patterns that it matched in time are fast in peft too.

    Args:
        settings: The fields of a peft config.
        names: The model's module names.
        where: The file or section, for the error message.
        error: The error class to raise.

    Raises:
        XTunerError: Of the given class: a pattern is invalid, or matching takes too long.
    """
    patterns = list(_patterns(settings))
    for name, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as problem:
            raise error(f'{where}: `{name}` is not a regular expression ({problem}), got {shown(pattern)}') from problem
    risky = [(name, pattern) for name, pattern in patterns if _REPEATS.search(pattern)]
    slow = _slow_pattern([pattern for _, pattern in risky], list(names)) if risky else None
    if slow is not None:
        name, pattern = risky[slow]
        raise error(f'{where}: `{name}` takes too long to match against the module names, got {shown(pattern)}; '
                    'simplify it, or list the names')  # fmt: skip


def _declared(cls: type) -> dict[str, Field]:
    hints = typing.get_type_hints(cls)
    special = {'lora_alpha': Field(float, minimum=-1e30, maximum=1e30),
           'task_type': Field(typing.Literal['CAUSAL_LM'] | None),
           'init_lora_weights': Field(Any)}  # fmt: skip
    fields = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name] | None if field.default is None else hints[field.name]
        fields[field.name] = Field(hint, -(2**63), 2**63)
    return fields | {name: field for name, field in special.items() if name in fields}


def _check_init(value: Any, hint: Any, path: Path) -> None:
    """Checks `init_lora_weights`; peft's type hint contains a placeholder, `pissa_niter_[number of iters]`.

    Raises:
        CheckpointError: The value is not one that peft accepts.
    """
    literals = [text for kind in typing.get_args(hint) for text in typing.get_args(kind)]
    names = [text for text in literals if '[' not in text] + ['lora_ga']
    if isinstance(value, bool) or (isinstance(value, str) and (value.lower() in names or _PISSA.fullmatch(value))):
        return
    raise CheckpointError(f'{path}: `init_lora_weights` must be True, False, {", ".join(map(repr, names))} or '
                          f"'pissa_niter_N' with N up to 999, got {shown(value)}")  # fmt: skip


def _shapes(folder: Path) -> Iterator[tuple[int, ...]]:
    path = weights_file(folder)
    check_regular(path, CheckpointError)
    try:
        names = file_names(open_file(path))
        reader = WeightReader(folder, dict.fromkeys(names, path))
        yield from (reader.shape(name) for name in names)
    except ModelError as error:
        raise CheckpointError(str(error)) from error


def _replicated(settings: Mapping[str, Any]) -> int:
    ranges = settings.get('layer_replication') or ()
    return sum(abs(b - a) for a, b in (r for r in ranges if len(r) == 2 and all(isinstance(i, int) for i in r)))


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the strings of a peft config that are matched as regular expressions, with their field."""
    for name in PATTERNS:
        value = settings.get(name)
        texts: Iterable[Any] = [value] if isinstance(value, str) else value or ()
        for i, text in enumerate(texts):
            if isinstance(text, str):
                yield (
                    (name if isinstance(value, str) else f'{name}[{text[:32] if isinstance(value, dict) else i}]'),
                    text,
                )


_TRY = """
import json, re, sys
seconds, patterns, names = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:
    pass  # on Windows only the caller's time-out applies
for index, pattern in enumerate(patterns):
    print(index, flush=True)
    for form in (pattern, r'(.*\\.)?(' + pattern + r')$', r'(^|.*\\.)' + pattern + r'($|\\..*)'):
        try:
            found = re.compile(form)
        except re.error:
            continue
        for name in names:
            found.fullmatch(name)
            found.match(name)
"""


def _slow_pattern(patterns: list[str], names: list[str]) -> int | None:
    """Returns the index of the pattern that exceeded the time limit; None if all were fast enough."""
    task = json.dumps([_CPU_SECONDS, patterns, names])
    try:
        done = subprocess.run([sys.executable, '-I', '-S', '-c', _TRY], input=task, capture_output=True, text=True,
                              timeout=30 * _CPU_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0
    return int((done.stdout.split() or ['0'])[-1]) if done.returncode else None
