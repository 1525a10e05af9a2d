"""What became of the records: counted at every step, never silent."""

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
    'left_out': 'left out by the map function',
    'too_long': 'dropped as longer than max_length',
    'cut': 'cut to max_length',
    'without_target': 'dropped as without a token to train',
}
_MOST_FIELDS, _OTHERS = (
    50,
    '(further fields)',
)  # unused names that are counted apart: data may invent a new one each time
_MOST_NAME = 80  # characters of a field's name that are shown


@dataclass
class Summary:
    """Counts of a preparation; `examples` holds, for each kind of loss, where it first happened.

    Attributes:
        records: Records read.
        conversations: Conversations that the map function made of them.
        kept: Conversations in the prepared data, cut ones included.
        tokens: Tokens of the kept conversations.
        target_tokens: Those of them that are trained.
        counts: How often each kind of loss occurred: bad, left_out, too_long, cut, without_target.
        unused: Fields that nothing reads and that change nothing, with the number of records that have them.
        ignored: Fields that `dataset.ignore` names, with the number of records that have them.
        notes: What else a source says of itself, such as files that were left out of a folder.
        spelt: Special tokens that answers spell as text, with the number of conversations that do.
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
        """Counts one loss of `kind`, and keeps `example` ('file:line', perhaps with the reason) of the first few."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < self.most_examples:
            kept.append(example)

    def add_unused(self, names: Iterable[str]) -> None:
        """Counts a record's fields that nothing reads."""
        for name in names:
            known = name in self.unused or len(self.unused) < _MOST_FIELDS
            _count(self.unused, name if known else _OTHERS)

    def add_ignored(self, names: Iterable[str]) -> None:
        """Counts a record's fields that were left out as `dataset.ignore` says."""
        for name in names:
            _count(self.ignored, name)

    @property
    def dropped(self) -> int:
        """What is lost: all kinds but `cut`, and what the map function meant to leave out."""
        return sum(count for kind, count in self.counts.items() if kind not in ('cut', 'left_out'))

    def lines(self) -> list[str]:
        """Returns the counts as text, a line a kind, with an example or more of each loss."""
        lines = self.report()
        for kind, text in _REASONS.items():
            if self.counts[kind]:
                shown = '; '.join(self.examples.get(kind, []))
                more = ', …' if self.counts[kind] > len(self.examples.get(kind, [])) else ''
                lines.append(printable(f'{self.counts[kind]} {text}: {shown}{more}'))
        return lines

    def _spelt_lines(self) -> list[str]:
        """Says which special tokens answers spell as text, the most frequent first."""
        if not self.spelt:
            return []
        names = sorted(self.spelt, key=lambda name: -self.spelt[name])
        shown = ', '.join(f'{name!r} ({counted(self.spelt[name], "conversation")})' for name in names[:5])
        more = ', …' if len(names) > 5 else ''
        return [printable(f'answers spell special tokens of the tokenizer, which are trained as text: {shown}{more}; '
                          'dataset.special_tokens_in_answers=True trains them as the tokens')]  # fmt: skip

    def report(self) -> list[str]:
        """Returns what was read as what, what is not used, and the counts: the same lines for every command."""
        lines = [f'{name}: {text}' for name, text in self.formats.items()] + self.notes
        for what, fields in (('not used', self.unused), ('left out by dataset.ignore', self.ignored)):
            lines += [f'{_shown(name)} is {what} ({counted(count, "record")})' for name, count in fields.items()]
        lines += self._spelt_lines()
        records, conversations = counted(self.records, 'record'), counted(self.conversations, 'conversation')
        tokens = f'{counted(self.tokens, "token")}, {self.target_tokens:,} of them trained'
        lines.append(f'{records}, {conversations}, {self.kept:,} kept ({self.counts["cut"]:,} of them cut), '
                     f'{self.dropped:,} dropped; {tokens}')  # fmt: skip
        return list(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as JSON can hold them."""
        return {**vars(self), 'counts': dict(self.counts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Returns the summary that `to_dict` wrote."""
        return cls(**{**values, 'counts': Counter(values['counts'])})


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _shown(name: str) -> str:
    """A field's name, which comes from the data, as a word of one line, with what it holds where that matters."""
    kind = kind_of(name.rpartition('.')[2])
    return f'`{one_line(name)[:_MOST_NAME]}`' + (f' ({kind})' if kind else '')
