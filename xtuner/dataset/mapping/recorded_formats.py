"""A resumed run keeps the formats that it detected when it began; today's detection applies to new runs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.map_fns import detect_map_fn, formats
from xtuner.dataset.map_fns.registration import first_detected_map_fn
from xtuner.dataset.mapping.map_records import function_name, visible_fields
from xtuner.dataset.sources.source import open_sources
from xtuner.errors import ConfigError

_PREFIX = 'detected as '


def with_recorded_formats(config: DatasetConfig, recorded: Mapping[str, str] | None) -> DatasetConfig:
    """Sets the recorded map function for each source in which today's detection would choose another one.

    Args:
        config: The `dataset` section of a resumed run.
        recorded: `Summary.formats` as recorded when the run began; None if none were recorded, as for streams: then the
            detection of the first releases decides.
    """
    if config.map_fn is not None:
        return config
    return replace(config, source=_named(config.source, recorded, config, len(_leaves(config.source))),
                   val_file=_named(config.val_file, recorded, config, 0))  # fmt: skip


def _leaves(spec: Any) -> list[Any]:
    return [leaf for item in spec for leaf in _leaves(item)] if _is_list(spec) else [spec]


def _is_list(spec: Any) -> bool:
    return isinstance(spec, Sequence) and not isinstance(spec, str)


def _named(spec: Any, recorded: Mapping[str, str] | None, config: DatasetConfig, num_sources: int) -> Any:
    """Returns the spec of a source, or of a list of sources, with the run's map function."""
    if _is_list(spec):
        return [_named(item, recorded, config, num_sources) for item in spec]
    if spec is None or (isinstance(spec, Mapping) and (spec.get('map_fn') or 'path' not in spec)):
        return spec
    [source] = open_sources(spec)
    if recorded is not None and len(recorded) == num_sources == 1:
        recorded = {source.name: next(iter(recorded.values()))}  # the data may have moved since
    if recorded is not None and source.name not in recorded:
        return spec
    first = next((record for record in source.records() if not record.error), None)
    if first is None:
        return spec
    fields = visible_fields(first, config.ignore)
    try:
        now = _format_name(detect_map_fn(fields, first.origin))
    except ConfigError:
        now = ''
    then = first_detected_map_fn(fields) if recorded is None else recorded[source.name].removeprefix(_PREFIX)
    if then == now or then not in formats():
        return spec
    return {**(spec if isinstance(spec, Mapping) else {'path': str(spec)}), 'map_fn': then}


def _format_name(function: Any) -> str:
    return function_name(function).removesuffix('_map_fn')
