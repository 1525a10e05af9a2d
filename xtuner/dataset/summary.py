"""Counts of records that were kept, dropped, truncated or skipped; nothing is dropped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xtuner.dataset.mapping.unread_fields import kind_of
from xtuner.errors import one_line
from xtuner.utils.escape import printable
from xtuner.utils.units import counted

_REASONS = {
    'bad': 'could not be used',
    'left_out': 'skipped by the map function',
    'too_long': 'dropped because longer than max_length',
    'cut': 'truncated to max_length',
    'without_target': 'dropped because no token is trained',
}
_MAX_FIELDS, _OTHER_FIELDS = 50, '(further fields)'  # unused names counted individually: each record may add new ones
_MAX_NAME = 80  # characters of a field's name in a message


@dataclass
class Summary:
    """Counts of a preparation; `examples` holds the first occurrences of each kind of loss.

    Attributes:
        records: Records read.
        conversations: Conversations returned by the map function.
        kept: Conversations in the prepared data, including truncated ones.
        tokens: Tokens of the kept conversations.
        target_tokens: Trained tokens among them.
        counts: Occurrences of each kind of loss: bad, left_out (by the map function), too_long, cut (truncated),
            without_target.
        unused: Fields that nothing reads and that do not affect training, with the number of records that have them.
        ignored: Fields that `dataset.ignore` names, with the number of records that have them.
        notes: Remarks of the sources, such as files of a folder that are skipped.
        spelt: Special tokens that answers contain as text, with the number of conversations that do.
    """

    records: int = 0
    conversations: int = 0
    kept: int = 0
    tokens: int = 0
    target_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spelt: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    most_examples: int = 5

    def record_drop(self, kind: str, example: str) -> None:
        """Counts one loss of `kind`; keeps the first few `example`s ('file:line', possibly with a reason)."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < self.most_examples:
            kept.append(example)

    def add_unused(self, names: Iterable[str]) -> None:
        """Counts a record's fields that nothing reads."""
        for name in names:
            counted_individually = name in self.unused or len(self.unused) < _MAX_FIELDS
            _count(self.unused, name if counted_individually else _OTHER_FIELDS)

    def add_ignored(self, names: Iterable[str]) -> None:
        """Counts a record's fields that were ignored by `dataset.ignore`."""
        for name in names:
            _count(self.ignored, name)

    @property
    def dropped(self) -> int:
        """Conversations dropped: all kinds except truncated ones and records that the map function skipped."""
        return sum(count for kind, count in self.counts.items() if kind not in ('cut', 'left_out'))

    def lines(self) -> list[str]:
        """Returns the counts as text: one line for each kind of loss, with examples."""
        lines = self.report()
        for kind, text in _REASONS.items():
            if self.counts[kind]:
                shown = '; '.join(self.examples.get(kind, []))
                more = ', …' if self.counts[kind] > len(self.examples.get(kind, [])) else ''
                lines.append(printable(f'{self.counts[kind]} {text}: {shown}{more}'))
        return lines

    def _spelt_lines(self) -> list[str]:
        """Reports the special tokens that answers contain as text, the most frequent first."""
        if not self.spelt:
            return []
        names = sorted(self.spelt, key=lambda name: -self.spelt[name])
        shown = ', '.join(f'{name!r} ({counted(self.spelt[name], "conversation")})' for name in names[:5])
        more = ', …' if len(names) > 5 else ''
        return [printable(f'answers contain special tokens of the tokenizer, trained as plain text: {shown}{more}; '
                          'dataset.special_tokens_in_answers=True trains them as special tokens')]  # fmt: skip

    def report(self) -> list[str]:
        """Returns detected formats, unused fields and counts: the same lines for every command."""
        lines = [f'{name}: {text}' for name, text in self.formats.items()] + self.notes
        for what, fields in (('not used', self.unused), ('ignored by dataset.ignore', self.ignored)):
            lines += [f'{_field_text(name)} is {what} ({counted(count, "record")})' for name, count in fields.items()]
        lines += self._spelt_lines()
        records, conversations = counted(self.records, 'record'), counted(self.conversations, 'conversation')
        tokens = f'{counted(self.tokens, "token")}, {self.target_tokens:,} of them trained'
        lines.append(f'{records}, {conversations}, {self.kept:,} kept ({self.counts["cut"]:,} of them truncated), '
                     f'{self.dropped:,} dropped; {tokens}')  # fmt: skip
        return list(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as a JSON-serializable dict."""
        return {**vars(self), 'counts': dict(self.counts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Returns the summary that `to_dict` wrote."""
        return cls(**{**values, 'counts': Counter(values['counts'])})


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _field_text(name: str) -> str:
    """A field's name, which comes from the data, on one line, with its kind of content if relevant for training."""
    kind = kind_of(name.rpartition('.')[2])
    return f'`{one_line(name)[:_MAX_NAME]}`' + (f' ({kind})' if kind else '')
