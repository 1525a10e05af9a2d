"""Pairs of an entry point and a kind of hostile field, made from the schemas that the files have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: dict[str, Any] = {
    'null': None, 'false': False, 'zero': 0, 'negative': -3, 'huge': 10**12, 'beyond 64 bits': 10**30,
    'nan': float('nan'), 'infinite': float('inf'), 'text': 'x', 'empty text': '', 'list': [[], {}, None],
    'object': {'x': {'y': [1]}}, 'deep': DEEP,
    'long': 'x' * 10**5, 'control characters': '\x1b[31mowned\x1b[0m\x07\x00\n\r', 'path': '../../../../../etc/passwd',
    'module': 'canary_of_a_stranger.x', 'installed module': 'this.s', 'function': 'os.system', 'hub': 'evil/evil',
    'address': 'http://127.0.0.1:9/evil', 'pattern': '(.*.*.*.*.*.*.*.*.*.*.*.*)*x', 'template': '{{ "a" * 10 }}',
}  # fmt: skip
FILE_KINDS = ('empty', 'cut', 'a list', 'null file', 'a number', 'deep file', 'key twice', 'not UTF-8', 'named pipe',
              'link to itself', 'folder', 'device', 'long digits')  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A command line and the files of strangers that it reads."""

    argv: tuple[str, ...]
    files: tuple[str, ...]
    stdin: str = ''


_MODEL = ('model/config.json', 'model/tokenizer_config.json', 'model/generation_config.json',
          'model/model.safetensors.index.json', 'model/tokenizer.json')  # fmt: skip
_ADAPTER = ('adapter/adapter_config.json', 'adapter/xtuner.json')
_TRAIN = ('train', 'config.py', '--work-dir', 'work')
_CHECKPOINT = 'run/checkpoint-00000001'
_CONVERTER = ('--converter', 'converter.py')
ENTRIES = {
    'train': Entry(_TRAIN, _MODEL),
    'train --start-from': Entry((*_TRAIN, '--start-from', 'run/checkpoint-00000001'),
                                (f'{_CHECKPOINT}/adapter_config.json', f'{_CHECKPOINT}/xtuner.json')),
    'train --resume': Entry(
        ('train', 'config.py', '--work-dir', 'run', '--max-steps', '2', '--allow-changes', '--resume'),
        tuple(f'{_CHECKPOINT}/{name}' for name in ('manifest.json', 'trainer.json', 'run.json', 'xtuner.json',
                                                   'adapter_config.json'))),
    'train options': Entry(_TRAIN, ('options',)),
    'estimate': Entry(('estimate', 'config.py', '--no-data'), ('model/config.json', 'options')),
    'chat': Entry(('chat', 'model', '--adapter', 'adapter', '--bits', '16', '--max-new-tokens', '2'),
                  (*_MODEL, *_ADAPTER), 'the cat\n'),
    'serve': Entry(('serve', 'model', '--adapter', 'adapter', '--bits', '8', '--port', '0'), (*_MODEL, *_ADAPTER)),
    'convert merge': Entry(('convert', 'merge', 'model', 'adapter', 'out'), (*_MODEL, *_ADAPTER)),
    'convert gguf': Entry(('convert', 'gguf', 'model', 'out.gguf', *_CONVERTER), _MODEL),
    'convert ollama': Entry(('convert', 'ollama', 'model', 'out', *_CONVERTER), (*_MODEL, 'model/xtuner.json')),
    'convert split': Entry(('convert', 'split', 'model', 'out'),
                           ('model/model.safetensors.index.json', 'model/config.json')),
    'convert to-llama': Entry(('convert', 'to-llama', 'internlm', 'out'),
                              ('internlm/config.json', 'internlm/tokenizer_config.json')),
    'convert pth_to_hf': Entry(('convert', 'pth_to_hf', 'old.py', 'iter.pth', 'out'),
                               ('model/tokenizer_config.json', 'model/config.json', 'model/tokenizer.json',
                                'iter.pth')),
    'check-custom-dataset': Entry(('check-custom-dataset', 'config.py'), ('data.jsonl', 'model/tokenizer_config.json')),
    'log-dataset': Entry(('log-dataset', 'config.py'), ('data.jsonl', 'model/tokenizer_config.json')),
    'preprocess': Entry(('preprocess', 'config.py'), ('data.jsonl', 'model/tokenizer_config.json')),
    'report': Entry(('report', 'run'), ('run/about.json', 'run/metrics.jsonl')),
    'doctor': Entry(('doctor',), ('model/config.json',)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One file made hostile, or one option."""

    entry: str
    file: str
    field: str
    kind: str

    @property
    def name(self) -> str:
        """What a failure is reported as."""
        return f'{self.entry}: {self.file} {self.field or "(whole)"} = {self.kind}'


def fields_of(file: str) -> list[str]:
    """The fields that a file may have, from the class that declares them; a dot leads into an object."""
    import peft
    from transformers import LlamaConfig

    from xtuner.adapters.attach import Provenance
    from xtuner.config.schema import QuantizationConfig
    from xtuner.model.config_file import _DROPPED
    from xtuner.model.families.internlm2.configuration import InternLM2Config
    from xtuner.model.tokenizer import _FIELDS

    def names(cls: type, within: str = '') -> list[str]:
        return [within + field.name for field in dataclasses.fields(cls)]

    name = file.rpartition('/')[2]
    extra = ['torch_dtype', 'rope_scaling', 'rope_theta', 'quantization_config', 'quantization_config.quant_method',
             'quantization_config.llm_int8_skip_modules', 'text_config', '_attn_implementation', 'to_dict',
             'attribute_map', 'tokenizer_class', *sorted(_DROPPED)]  # fmt: skip
    config = InternLM2Config if file.startswith('internlm') else LlamaConfig
    return {
        'config.json': lambda: ['model_type', *names(config), *extra],
        'adapter_config.json': lambda: names(peft.LoraConfig),
        'xtuner.json': lambda: ['template', *names(Provenance), *names(QuantizationConfig, 'quantization.'),
                                'training.data'],
        'tokenizer_config.json': lambda: [*_FIELDS[name], 'tokenizer_class', 'init_inputs', 'fast_tokenizer_files',
                                          'added_tokens_decoder.5', 'name_or_path', 'xtuner_add_prefix'],
        'tokenizer.json': lambda: [*_FIELDS[name], 'model.type', 'model.vocab', 'model.merges', 'pre_tokenizer.type'],
        'generation_config.json': lambda: ['eos_token_id', 'bos_token_id', 'pad_token_id', 'custom_generate',
                                           'temperature', 'cache_implementation', 'max_length', 'transformers_version'],
        'model.safetensors.index.json': lambda: ['weight_map', 'metadata', 'weight_map.model.norm.weight'],
        'manifest.json': lambda: ['trainer.json', 'trainer.json|bytes', 'x'],
        'trainer.json': lambda: ['dict', 'tensor', 'list'],
        'run.json': lambda: ['run', 'versions', 'run.adapter.r'],
        'about.json': lambda: ['sessions', 'plan', 'data', 'config', 'model', 'versions'],
        'metrics.jsonl': lambda: ['step', 'loss', 'lr', 'val_loss', 'tokens', 'seconds'],
        'data.jsonl': lambda: ['messages', 'role', 'content', 'id', 'tools', 'messages.tool_calls', 'loss'],
        'iter.pth': lambda: [],  # no JSON: it is spoilt as a whole
        'options': _options,
    }[name]()  # fmt: skip


def _options() -> list[str]:
    from xtuner.config.schema import TrainConfig

    found = []
    for field in dataclasses.fields(TrainConfig):
        section = next((arg for arg in (*getattr(field.type, '__args__', ()),) if dataclasses.is_dataclass(arg)), None)
        found.append(field.name)
        module = __import__('xtuner.config.schema', fromlist=['x'])
        section = getattr(module, str(field.type).split(' ')[0], None)
        if dataclasses.is_dataclass(section):
            found += [f'{field.name}.{inner.name}' for inner in dataclasses.fields(section)]
    return [*found, 'optimizer.lr', 'optimizer.betas', 'optimizer.weight_decay', 'adapter.r', 'adapter.lora_alpha',
            'adapter.target_modules', 'adapter.bias', 'optimizer.type', 'adapter.type']  # fmt: skip


# A user's own words that may name code, hub ids and addresses: what they do is asked for.
OWN_WORDS = ('model.path', 'model.trust_remote_code', 'dataset.source', 'dataset.map_fn', 'dataset.val_file',
             'dataset.cache_dir', 'optimizer.type', 'adapter.type', 'hooks', 'model', 'dataset', 'optimizer',
             'adapter')  # fmt: skip


def all_cases() -> Iterator[Case]:
    """Yields every pair of entry point and kind once, then every field of every file once."""
    seen: set[tuple[str, str]] = set()
    for entry, found in ENTRIES.items():
        fields = [(file, field) for file in found.files for field in fields_of(file)]
        shift = len(seen) * 7
        turns = itertools.cycle(fields[shift % len(fields):] + fields[: shift % len(fields)])  # fmt: skip
        for kind in VALUES:
            file, field = next(turns)
            if file == 'options' and field in OWN_WORDS and isinstance(VALUES[kind], str):
                file, field = next((f, n) for f, n in turns if n not in OWN_WORDS)
            seen.add((file, field))
            yield Case(entry, file, field, kind)
        for kind, file in zip(FILE_KINDS, itertools.cycle(f for f in found.files if f != 'options')):
            yield Case(entry, file, '', kind)
    kinds = itertools.cycle(VALUES)
    for entry in ('chat', 'train options', 'train --resume', 'convert to-llama', 'check-custom-dataset', 'report'):
        for file in ENTRIES[entry].files:
            for field in fields_of(file):
                kind = next(kinds)
                own = file == 'options' and field in OWN_WORDS
                if (file, field) not in seen and not own:
                    seen.add((file, field))
                    yield Case(entry, file, field, kind)
