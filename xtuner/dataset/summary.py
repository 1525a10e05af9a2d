"""What became of the records: counted at every step, never silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from xtuner.dataset.show import counted

_REASONS = {
    'bad': 'could not be used',
    'left_out': 'left out by the map function',
    'too_long': 'dropped as longer than max_length',
    'cut': 'cut to max_length',
    'without_target': 'dropped as without a token to train',
}


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
    spelt: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    most_examples: int = 5

    def lose(self, kind: str, example: str) -> None:
        """Counts one loss of `kind`, and keeps `example` ('file:line', perhaps with the reason) of the first few."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < self.most_examples:
            kept.append(example)

    @property
    def dropped(self) -> int:
        """What is lost: all kinds but `cut`, and what the map function meant to leave out."""
        return sum(count for kind, count in self.counts.items() if kind not in ('cut', 'left_out'))

    def lines(self) -> list[str]:
        """Returns the counts as text, a line a kind."""
        lines = [f'{name}: {text}' for name, text in self.formats.items()]
        records, conversations = counted(self.records, 'record'), counted(self.conversations, 'conversation')
        tokens = f'{counted(self.tokens, "token")}, {self.target_tokens:,} of them trained'
        lines.append(f'{records}, {conversations}, {self.kept:,} kept ({self.counts["cut"]:,} of them cut), '
                     f'{self.dropped:,} dropped; {tokens}')  # fmt: skip
        for kind, text in _REASONS.items():
            if self.counts[kind]:
                shown = '; '.join(self.examples.get(kind, []))
                more = ', …' if self.counts[kind] > len(self.examples.get(kind, [])) else ''
                lines.append(f'{self.counts[kind]} {text}: {shown}{more}')
        if self.spelt:
            names = sorted(self.spelt, key=lambda name: -self.spelt[name])
            shown = ', '.join(f'{name!r} ({counted(self.spelt[name], "conversation")})' for name in names[:5])
            lines.append(f'answers spell special tokens of the tokenizer, which are trained as text: {shown}'
                         f'{", …" if len(names) > 5 else ""}; dataset.special_tokens_in_answers=True trains them as '
                         'the tokens')  # fmt: skip
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as JSON can hold them."""
        return {**vars(self), 'counts': dict(self.counts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Returns the summary that `to_dict` wrote."""
        return cls(**{**values, 'counts': Counter(values['counts'])})
