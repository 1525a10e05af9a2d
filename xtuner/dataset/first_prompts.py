"""The first prompts of the training data, for samples in a run that names none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.mapping.map_records import map_records
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template

_SEEN = 200  # conversations among which short prompts are looked for
_SHORT = 1000  # characters


def first_prompts(config: DatasetConfig, template: Template, *, count: int = 2) -> list[tuple[Message, ...]]:
    """What stands before the first answer of the first conversations, each prompt once; the same on every rank.

    Args:
        config: The `dataset` section; its sources are read from the beginning.
        template: The prompt format, which decides what of a record is used.
        count: Prompts. Fewer where the data has no more; none where it has no prompts, as documents to continue.

    Returns:
        Messages up to a user's, a system message before it where the conversation has one. Short ones where there are.

    Raises:
        XTunerError: as preparation, which has read the same records before.
    """
    prompts = _prompts(config, template)
    found = list({tuple(message.content for message in prompt): prompt for prompt in prompts}.values())
    short = [prompt for prompt in found if sum(len(message.content) for message in prompt) <= _SHORT]
    return (short or found)[:count]


def _prompts(config: DatasetConfig, template: Template) -> Iterator[tuple[Message, ...]]:
    for conversation in islice(_conversations(config, template), _SEEN):
        prompt = tuple(takewhile(lambda message: message.role in ('system', 'user'), conversation.messages))
        if prompt and prompt[-1].role == 'user' and not conversation.tools:
            yield tuple(Message(message.role, message.content) for message in prompt)


def _conversations(config: DatasetConfig, template: Template) -> Iterator[Conversation]:
    for source in open_sources(config.source):
        yield from map_records(source, config, Summary(), template)
