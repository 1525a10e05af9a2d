"""OpenAssistant in the guanaco text format: `text` with `### Human:` and `### Assistant:` in turn."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.errors import DataError

_MARKERS = ('### Human:', '### Assistant:')


def _is_guanaco(record: Any) -> bool:
    text = record.get('text')
    return isinstance(text, str) and text.lstrip().startswith(_MARKERS[0])


@map_fn('text', detect=_is_guanaco)
def oasst1_map_fn(example: dict[str, Any]) -> dict[str, Any] | None:
    """Splits the text at the next speaker's marker only: any other `###` is content.

    A final question without an answer is dropped; a text without any answer is skipped.
    """
    text = example['text']
    if not isinstance(text, str) or not text.lstrip().startswith(_MARKERS[0]):
        raise DataError(f'`text` must begin with {_MARKERS[0]!r}, got {str(text)[:40]!r}')
    parts: list[str] = []
    rest: str | None = text.lstrip().removeprefix(_MARKERS[0])
    while rest is not None:
        part, marker, behind = rest.partition(_MARKERS[(len(parts) + 1) % 2])
        parts.append(part.strip())
        rest = behind if marker else None
    turns = [{'input': parts[i], 'output': parts[i + 1]} for i in range(0, len(parts) - 1, 2)]
    return {'conversation': turns} if turns else None
