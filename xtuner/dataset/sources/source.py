"""Opens the sources that a config names, with a fingerprint of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtuner.dataset.sources.files import Advance, check_data_file, is_data_file, kind_of_file
from xtuner.dataset.sources.folder import data_files
from xtuner.dataset.sources.readers import Record, read_file
from xtuner.errors import ConfigError, DataError, nearest, one_line
from xtuner.utils.files import expanded
from xtuner.utils.progress import Progress

_FIELDS = ('path', 'name', 'split', 'revision', 'map_fn', 'weight', 'data_files', 'streaming')


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        name: Its name in messages.
        records: Yields its records, from the start at every call. Calls its argument, if it gets one, with the number
            of `unit` read since the last call.
        fingerprint: A hash that changes when the records change.
        map_fn: This source's own map function; None uses the config's.
        weight: How often it counts: 0.5 takes half of its conversations, 2 takes each twice.
        notes: Remarks for the log, such as files of a folder that are skipped.
        total: How many of `unit` there are; None: unknown.
        unit: The unit of progress: 'B' for bytes of files, or 'records'.
    """

    name: str
    records: Callable[..., Iterator[Record]]
    fingerprint: Callable[[], str]
    map_fn: Any = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()
    total: int | None = None
    unit: str = 'records'


def open_sources(spec: Any, *, field: str = 'dataset.source') -> list[Source]:
    """Returns the sources that a config names.

    Args:
        spec: A file, a folder, a hub id, `modelscope:OWNER/NAME`; a dict with `path` and optionally `name`, `split`,
            `revision`, `data_files`, `streaming`, `map_fn`, `weight`; a loaded data set; or a list of these.
        field: The config's field, for error messages.

    Raises:
        ConfigError: The value has another form.
        DataError: A file or folder does not exist or contains nothing readable.
    """
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise ConfigError(f'`{field}` is an empty list; name at least one source')
        return [source for item in spec for source in open_sources(item, field=field)]
    if isinstance(spec, (str, Path)):
        return [_open(str(spec), {})]
    if isinstance(spec, Mapping):
        return [_from_mapping(spec, field)]
    if hasattr(spec, '__iter__') and not isinstance(spec, (bytes, int, float)):
        return [_loaded(spec, type(spec).__name__)]
    raise ConfigError(f'`{field}` must be a file, a folder, a hub id, a dict or a list of these, got {spec!r}')


@contextmanager
def with_progress(source: Source) -> Iterator[Source]:
    """Gives the source whose reading is shown as progress during the `with` block."""
    with Progress(total=source.total, desc=f'reading {source.name}', unit=source.unit) as progress:
        yield replace(source, records=lambda: source.records(progress.update))


def check_local(spec: Any) -> None:
    """Checks that the files and folders that a config names exist, without opening them; hub ids are not checked.

    Raises:
        DataError: One of them does not exist.
    """
    if isinstance(spec, (list, tuple)):
        for item in spec:
            check_local(item)
    elif isinstance(spec, Mapping) and 'type' not in spec:
        check_local(spec.get('path'))
    elif isinstance(spec, (str, Path)) and not str(spec).startswith('modelscope:'):
        _is_local(str(spec))


def _is_local(path: str) -> bool:
    """Whether a path exists locally; otherwise it is a hub id, or DataError is raised if it cannot be one."""
    local = expanded(path)
    if local.exists() or local.is_symlink():
        return True
    # A hub id has at most one slash and no data file suffix.
    if local.is_absolute() or path.startswith(('.', '~')) or is_data_file(local) or path.count('/') > 1:
        siblings = [str(p) for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise DataError(f'{path}: no such file or folder{nearest(str(local), siblings, most=1)}')
    return False


def _from_mapping(spec: Mapping[str, Any], field: str) -> Source:
    if 'type' in spec:  # the classical form: dict(type=load_dataset, path=...)
        from xtuner.registry import BUILDER

        loaded = BUILDER.build(dict(spec))
        return _loaded(loaded['train'] if isinstance(loaded, Mapping) else loaded, str(spec.get('path', 'data set')))
    unknown = sorted(set(spec) - set(_FIELDS))
    if unknown or 'path' not in spec:
        raise ConfigError(f'`{field}` must be a dict with `path` and optionally {", ".join(_FIELDS[1:])}; got '
                          f'{", ".join(map(str, spec))}{nearest(unknown[0], _FIELDS) if unknown else ""}')  # fmt: skip
    weight = spec.get('weight', 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float('inf'):
        raise ConfigError(f'`{field}`: `weight` must be a number above 0, got {weight!r}')
    source = _open(str(spec['path']), spec)
    return replace(source, map_fn=spec.get('map_fn'), weight=float(weight))


def _open(path: str, options: Mapping[str, Any]) -> Source:
    if path.startswith('modelscope:'):
        return _modelscope(path.removeprefix('modelscope:'), options)
    local = expanded(path)
    if local.is_dir():
        return _saved(local) if _is_saved(local) else _files(path, *data_files(local))
    if not _is_local(path):
        return _hub(path, options)
    check_data_file(local)
    kind_of_file(local)
    return _files(path, [local], [])


def _files(name: str, files: list[Path], notes: list[str]) -> Source:
    return Source(
        name,
        lambda advance=None: (record for file in files for record in read_file(file, advance)),
        lambda: hashlib.blake2b(b''.join(map(hash_file, files)), digest_size=16).hexdigest(),
        notes=tuple(notes),
        total=sum(file.stat().st_size for file in files if file.exists()),
        unit='B',
    )


_hashes: dict[tuple[str, int, int], bytes] = {}


def hash_file(file: Path) -> bytes:
    """Returns a hash of a file's name and content; an unchanged file is read only once per process."""
    stat = check_data_file(file)
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        digest = hashlib.blake2b(file.name.encode(), digest_size=16)
        try:
            with file.open('rb') as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f'{file}: cannot be read: {error.strerror or error}') from None
        _hashes[key] = digest.digest()
    return _hashes[key]


def _loaded(dataset: Any, name: str) -> Source:
    """Source for a data set that is already in memory or memory-mapped."""

    def fingerprint() -> str:
        """The library's own fingerprint of the data, or a hash over all rows."""
        library_hash = getattr(dataset, '_fingerprint', None)
        if library_hash:
            return str(library_hash)
        digest = hashlib.blake2b(digest_size=16)
        for row in dataset:
            digest.update(repr(row).encode('utf-8', 'surrogatepass'))
        return digest.hexdigest()

    def records(advance: Advance | None = None) -> Iterator[Record]:
        for i, row in enumerate(dataset):
            yield Record(f'{name}[{i}]', row)
            if advance is not None:
                advance(1)

    return Source(name, records, fingerprint, total=len(dataset) if isinstance(dataset, Sized) else None)


def _is_saved(folder: Path) -> bool:
    return (folder / 'state.json').is_file() or (folder / 'dataset_dict.json').is_file()


def _saved(folder: Path) -> Source:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # the library raises many exception types
        raise DataError(f'{folder}: the saved data set cannot be read: {one_line(error)}') from None
    source = _loaded(_split(loaded, 'train', str(folder)), str(folder))
    others = [str(name) for name in loaded if name != 'train'] if isinstance(loaded, Mapping) else []
    notes = [f'{folder}: training on the split train of the saved data set, not on {", ".join(others)}']
    return replace(source, notes=tuple(notes if others else ()))


def _hub(path: str, options: Mapping[str, Any]) -> Source:
    from datasets import load_dataset

    arguments = {key: options[key] for key in ('name', 'revision', 'data_files', 'streaming') if options.get(key)}
    split = options.get('split', 'train')
    try:
        dataset = load_dataset(path, split=split, **arguments)
    except Exception as error:  # the library raises many exception types, some with long texts
        reason = (str(error).splitlines() or [''])[0][:200]
        raise DataError(f'{path}: neither a local file or folder nor a data set that the hub returned '
                        f'({type(error).__name__}: {reason}); check the spelling, the network and HF_TOKEN, or '
                        'download it and set its folder as the source') from None  # fmt: skip
    name = f'{path}:{split}'
    loaded = _loaded(dataset, name)
    if not options.get('streaming'):
        return loaded
    # A stream's content is unknown before it is read: the id, split and revision identify it.
    return Source(name, loaded.records, lambda: f'{path}:{split}:{sorted(arguments.items())!r}')


def _split(dataset: Any, split: str, name: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if split not in dataset:
        raise DataError(f'{name}: no split {split!r}; available: {", ".join(map(str, dataset))}')
    return dataset[split]


def _modelscope(path: str, options: Mapping[str, Any]) -> Source:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise ConfigError(
            f'`modelscope:{path}` needs the package modelscope: pip install "xtuner[modelscope]"'
        ) from None
    split = options.get('split', 'train')
    arguments = {to: options[of] for of, to in (('name', 'subset_name'), ('revision', 'version')) if options.get(of)}
    try:
        dataset = MsDataset.load(path, split=split, **arguments)
    except Exception as error:
        raise DataError(f'modelscope:{path}: cannot be loaded ({type(error).__name__}: {str(error)[:200]})') from None
    dataset = dataset.to_hf_dataset() if hasattr(dataset, 'to_hf_dataset') else dataset
    return _loaded(dataset, f'modelscope:{path}:{split}')
