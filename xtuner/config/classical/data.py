"""Translates the data of a classical config, `train_dataloader.dataset`, in its four formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtuner.config.classical.section import Findings, Section, type_name

_FILE_LOADERS = ('json', 'csv', 'parquet')
_DATASETS = ('process_hf_dataset', 'process_ms_dataset', 'ConcatDataset', 'MOSSSFTDataset')


@dataclass(frozen=True)
class Part:
    """One data set: its source, and the settings that all data sets in the same packs must share."""

    source: Any
    map_fn: str | None
    max_length: int
    packing: str
    template: str


def translate_data(section: Section, model_path: str) -> tuple[dict[str, Any], str]:
    """Returns the `dataset` section and the name of the template.

    Args:
        section: `train_dataloader.dataset`.
        model_path: Path of the base model; the tokenizer must have the same path.
    """
    parts = _parts(section, model_path)
    first = parts[0]
    for part in parts[1:]:
        for key in ('max_length', 'packing', 'template'):
            if getattr(part, key) != getattr(first, key):
                section.fault(f'`{section.where}`: its parts differ in {key} ({getattr(first, key)!r} and '
                              f'{getattr(part, key)!r}); they share packs and need the same value')  # fmt: skip
    values: dict[str, Any] = {
        # Unusable records were never an error in classical xtuner; now they are counted and reported.
        'max_length': first.max_length, 'packing': first.packing, 'on_bad_record': 'skip', 'unique_id': None,
    }  # fmt: skip
    if len(parts) == 1:
        return values | {'source': first.source, 'map_fn': first.map_fn}, first.template
    return values | {'source': [_with_map_fn(part) for part in parts]}, first.template


def check_tokenizer(value: Any, where: str, model_path: str, findings: Findings) -> None:
    """Adds a fault if the tokenizer is not the model's, or has options that would change it."""
    section = Section(value, where, findings)
    section.type('AutoTokenizer.from_pretrained')
    path = section.take('pretrained_model_name_or_path')
    if path != model_path:
        section.fault(f'`{section.path("pretrained_model_name_or_path")}` is {path!r} and the model is {model_path!r}; '
                      'the tokenizer must be that of the model')  # fmt: skip
    for key in ('trust_remote_code', 'padding_side', 'use_fast'):
        section.take(key)
    section.close()


def _parts(section: Section, model_path: str) -> list[Part]:
    kind = section.type(*_DATASETS)
    if kind == 'ConcatDataset':
        named = section.take('datasets_cfg')  # the format of the first releases
        datasets = list(named.values()) if isinstance(named, dict) else section.need('datasets') or []
        section.close()
        if not isinstance(datasets, (list, tuple)) or not datasets:
            section.fault(f'`{section.path("datasets")}` must be a list of data sets')
            datasets = [{}]
        inner = [Section(item, f'{section.where}.datasets[{i}]', section.findings) for i, item in enumerate(datasets)]
        return [part for item in inner for part in _parts(item, model_path)]
    if 'tokenizer' in section:
        check_tokenizer(section.take('tokenizer'), section.path('tokenizer'), model_path, section.findings)
    part = _moss(section) if kind == 'MOSSSFTDataset' else _processed(section)
    section.close()
    return [part]


def _moss(section: Section) -> Part:
    section.refuse("remove it to use the bot's name in the data, or rename it in the data", 'bot_name')
    return Part(section.need('data_file'), 'moss_003_sft', section.take('max_length') or 2048, 'none', 'moss_sft')


def _processed(section: Section) -> Part:
    section.refuse('training on images is not supported', 'with_image_token')
    if section.take('input_ids_with_output', True) is not True:
        section.fault(f'`{section.path("input_ids_with_output")}` must be True: a prompt without its answer has no '
                      'targets')  # fmt: skip
    section.refuse('rename columns in your own map function', 'rename_maps')
    section.refuse("select a part with `split='train[:1000]'`, or shorten the file", 'max_dataset_length')
    section.ignore('encoding uses all cores', 'map_num_proc')
    section.take('remove_unused_columns')  # only the return value of the map function is used
    packed = section.take('pack_to_max_length', True)
    shuffled = section.take('shuffle_before_pack', True)
    if not section.take('use_varlen_attn', False) and packed:
        section.findings.note('samples of a pack do not attend to each other, as with use_varlen_attn=True')
    return Part(
        source=_source(section.section('dataset'), section.take('split') or 'train'),
        map_fn=_map_fn(section.take('dataset_map_fn')),
        max_length=section.need('max_length'),
        packing='none' if not packed else 'best_fit' if shuffled else 'stream',
        template=_template(section),
    )


def _source(section: Section, split: str) -> Any:
    """The source of a `load_dataset` call or similar: a file, a list of files, or a dict with `path`."""
    kind = section.type('load_dataset', 'load_from_disk', 'MsDataset.load')
    if kind == 'load_from_disk':
        return _closed(section, section.need('dataset_path'))
    if kind == 'MsDataset.load':
        name, owner = section.need('dataset_name'), section.take('namespace')
        path = f'{owner}/{name}' if owner else name
        options = {'name': section.take('subset_name'), 'revision': section.take('version')}
        return _closed(section, _located(f'modelscope:{path}', section.take('split') or split, options))
    path, files, split = section.need('path'), section.take('data_files'), section.take('split') or split
    if path in _FILE_LOADERS:
        if '[' in split:
            section.fault(f'`{section.path("split")}` is {split!r}: all records of a file are read; shorten the file')
        if isinstance(files, dict):
            files = files.get(split)
        if not files:
            section.fault(f'`{section.path("data_files")}` must contain the files of {split!r}')
        if isinstance(files, (list, tuple)):
            files = files[0] if len(files) == 1 else list(files)
        return _closed(section, files)
    options = {'name': section.take('name'), 'revision': section.take('revision'), 'data_files': files}
    return _closed(section, _located(path, split, options))


def _located(path: str, split: str, options: dict[str, Any]) -> Any:
    set_options = {key: value for key, value in options.items() if value}
    if split != 'train':
        set_options['split'] = split
    return {'path': path, **set_options} if set_options else path


def _closed(section: Section, source: Any) -> Any:
    section.close()
    return source


def _with_map_fn(part: Part) -> Any:
    if isinstance(part.source, list):  # several files of one data set
        return [{'path': file, 'map_fn': part.map_fn} for file in part.source]
    source = part.source if isinstance(part.source, dict) else {'path': part.source}
    return {**source, 'map_fn': part.map_fn}


def _map_fn(value: Any) -> Any:
    if value is None:  # the records are conversations already, in one of two formats
        return None
    name = type_name(value)
    is_builtin = str(value).startswith('xtuner.') or getattr(value, '__module__', '').startswith('xtuner.')
    if isinstance(value, str) and ':' not in value and not is_builtin:  # 'module.function', written by old runs
        value = ':'.join(value.rsplit('.', 1))
    return name.removesuffix('_map_fn') if is_builtin else value


def _template(section: Section) -> str:
    """The name of the template in `dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.internlm_chat)`."""
    if 'template_map_fn' not in section:
        section.take('template_map_fn')
        return 'plain'
    factory = section.section('template_map_fn')
    factory.type('template_map_fn_factory')
    template = factory.need('template')
    factory.close()
    name = template.rpartition(':')[2] if isinstance(template, str) else getattr(template, 'name', None)
    if not name:
        section.fault(f'`{factory.path("template")}` must be a template of PROMPT_TEMPLATE; register your own '
                      'as a `Template` (docs/data.md)')  # fmt: skip
    return name or 'default'
