"""Fields of a record that nothing reads: an error if one would change what is trained, otherwise a counted note.

One rule for every reader, map function and template. A field is used if the map function reads it (columns of the
record), if `to_conversation` reads it (`loss` and its synonyms), or if the chat template reads it (other fields of a
message, `tools`). The remaining fields are looked up in `kind_of`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from xtuner.errors import DataError
from xtuner.utils.fields import shown

# Names used by other tools, in lower case and without `_`, `-` and spaces: `toolCalls` and `tool_calls` are equal.
_NAMES = {
    'system text': 'system systemprompt systemmessage systemtext systeminstruction systeminstructions sysprompt sysmsg '
    'systemcontent metainstruction metaprompt developer developermessage developerprompt',
    'earlier turns': 'history chathistory conversationhistory dialoghistory dialoguehistory messagehistory '
    'pastmessages previousmessages previousturns messages conversation conversations dialog dialogue turns',
    'tools': 'tool tools toolschema toolsjson availabletools functions functionschema functioncall functioncalls '
    'toolcall toolcalls toolresponse toolresponses toolresult toolresults plugins',
    'reasoning': 'reasoning reasoningcontent reasoningtext reasoningdetails reasoningtrace reasoningsteps thinking '
    'thinkingcontent thinkingblocks thought thoughts think cot chainofthought rationale',
    'training flag': 'mask lossmask losses labelmask trainmask traindetail trainingdetail trainonturn trainon '
    'needeostoken',
}  # fmt: skip
_TRAINED = (
    'loss weight train training trained istrain istrained trainable istrainable dotrain shouldtrain needloss hasloss '
    'withloss isloss computeloss calculateloss outputwithloss outputloss trainonoutput trainoutput lossweight '
    'lossscale trainweight trainingweight sampleweight'
)
_UNTRAINED = 'masked ismasked ignoreloss skiploss noloss notrain donttrain ignoretrain skiptrain'
_SENSE = dict.fromkeys(_TRAINED.split(), True) | dict.fromkeys(_UNTRAINED.split(), False)
_MEDIA = re.compile(r'(image|audio|video|picture|pixelvalue)s?(url|path|file|name|byte|input|list|id)?s?')
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_KINDS |= dict.fromkeys(_SENSE, 'training flag')
_WORDS = {'true': True, 'false': False, '1': True, '0': False, '1.0': True, '0.0': False}


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str:
    """Kind of training-relevant content that a field of this name holds, such as 'reasoning'; '' for any other name."""
    name = _squeezed(name)
    return _KINDS.get(name, '') or ('image, audio or video' if _MEDIA.fullmatch(name) else '')


@lru_cache(maxsize=4096)
def _squeezed(name: str) -> str:
    return re.sub(r'[^a-z0-9]', '', name.lower())


def is_empty(value: Any) -> bool:
    """Whether a value is empty: None, '', or a list or dict of only such values, as columnar files pad records."""
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    return value is None or value == '' if not isinstance(value, Mapping) else all(map(is_empty, value.values()))


def training_flag(fields: Mapping[str, Any], name: str, origin: str) -> tuple[bool | None, list[str]]:
    """Returns the training flag of a message (None if it has none) and the fields that set it.

    Args:
        fields: The message, with `loss`, `weight`, `train` or a synonym as a bool, 0 or 1, or such a word.
        name: The message's position, such as `messages[1]`.
        origin: Where the record came from.

    Raises:
        DataError: For any other value, such as a weight of 0.5, or if two fields contradict each other.
    """
    flags = {}
    for key, value in fields.items():
        sense = trained_by(key) if isinstance(key, str) else None
        if sense is not None and not is_empty(value):
            flags[key] = _flag(value, f'{name}.{key}', origin) is sense
    if len(set(flags.values())) > 1:
        raise DataError(f'{origin}: `{name}` has contradicting training flags: {", ".join(flags)}')
    return next(iter(flags.values()), None), list(flags)


def _flag(value: Any, name: str, origin: str) -> bool:
    if (flag := flag_of(value)) is None:
        raise DataError(f'{origin}: `{name}` must be true, false, 0 or 1, got {shown(value)}; a message is trained '
                        'as a whole or not at all; if it is not a training flag, ignore it with '
                        f'dataset.ignore=[{name.rpartition(".")[2]!r}]')  # fmt: skip
    return flag


def flag_of(value: Any) -> bool | None:
    """Parses a flag (a bool, 0 or 1, or such a word); returns None for any other value."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def trained_by(name: str) -> bool | None:
    """The flag value that means "trained": True for `loss`, False for `masked`; None for a name that is not a flag."""
    return _SENSE.get(_squeezed(name))


class Observed(dict):
    """A record that tracks which of its columns were read; iterating over it reads all of them."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(record)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self.read.update(dict.keys(self))
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def get(self, key: str, default: Any = None) -> Any:
        """Reads a column if it exists."""
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Reads and removes a column."""
        self.read.add(key)
        return super().pop(key, *default)

    def items(self) -> Any:
        """Reads all columns."""
        return dict(self).items()

    def values(self) -> Any:
        """Reads all columns."""
        return dict(self).values()

    def copy(self) -> dict[str, Any]:
        """Reads all columns."""
        return dict(self)


_NESTED = (dict, list)


def without(value: Any, names: frozenset[str], removed: set[str], *, padding: bool) -> Any:
    """Returns a value without the fields in `names`, at any depth outside tools and tool calls.

    Args:
        value: A record, or a part of one.
        names: Fields to remove.
        removed: Receives the names of removed fields that had content.
        padding: Whether to remove None values too: a columnar file adds them for every field of any record.
    """
    if type(value) is list:
        return [without(item, names, removed, padding=padding) if type(item) in _NESTED else item for item in value]
    kept = {}
    for key, item in value.items():
        if key in names:
            if not is_empty(item):
                removed.add(key)
        elif type(item) in _NESTED:
            inner = frozenset() if names and kind_of(str(key)) == 'tools' else names
            kept[key] = without(item, inner, removed, padding=padding)
        elif item is not None or not padding:
            kept[key] = item
    return kept


def _kind(key: str, value: Any) -> str:
    """`kind_of`, except that a number is only relevant as a training flag; elsewhere it is a count or a label."""
    kind = kind_of(key)
    return '' if isinstance(value, (bool, int, float)) and kind != 'training flag' else kind


def check_extras(
    extras: Mapping[str, Any], name: str, template: Any, origin: str, *, note: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the extra fields of a message that its template reads; reports the others.

    Reasoning is passed under the name that the template reads, whichever synonym the data uses.

    Args:
        extras: The message's fields other than `role`, `content` and the training flag.
        name: The message's position, such as `messages[1]`.
        template: The prompt template; its `reads` says which fields it uses.
        origin: Where the record came from.
        note: Called with the name of each unused field.

    Raises:
        DataError: A field would change what is trained.
    """
    kept = {}
    for key, value in extras.items():
        kind = _kind(key, value)
        read = key if template.reads(key) else _synonym(kind, template)
        if read and read not in kept:
            kept[read] = value
        elif kind:
            raise unused(f'{origin}: `{name}.{key}` ({kind}) is not supported by the template `{template.name}`',
                         _REMEDIES.get(kind) or from_tokenizer(template, 'write it into `content`'), key)  # fmt: skip
        else:
            note(f'{name.partition("[")[0]}[].{key}')
    return kept


_REASONING = ('reasoning_content', 'reasoning', 'thinking', 'thought')


def _synonym(kind: str, template: Any) -> str:
    return next(filter(template.reads, _REASONING), '') if kind == 'reasoning' else ''


_REMEDIES = {
    'training flag': 'write `loss` as true or false into each message',
    'image, audio or video': 'only text is trained: remove such records',
}


def from_tokenizer(template: Any, otherwise: str) -> str:
    """Remedy for a field that a template does not support."""
    if template.name == 'from_tokenizer':
        return otherwise
    return f"set model.template='from_tokenizer' if the tokenizer's chat template reads it, {otherwise}"


def unused(what: str, remedy: str, key: str) -> DataError:
    """Returns the error for an unused field that would change what is trained."""
    return DataError(f'{what}, although it would change what is trained; {remedy}, or ignore it with '
                     f'dataset.ignore=[{key!r}]')  # fmt: skip
