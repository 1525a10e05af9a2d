"""First prompts of the training data, used for sample generation in a run that names no prompts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.mapping.map_records import map_records
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template

_MAX_CONVERSATIONS = 200  # conversations searched for short prompts
_SHORT_CHARACTERS = 1000


def first_prompts(config: DatasetConfig, template: Template, *, count: int = 2) -> list[tuple[Message, ...]]:
    """Returns the prompts before the first answers of the first conversations, without duplicates, equal on all ranks.

    Args:
        config: The `dataset` section; its sources are read from the start.
        template: The prompt format, which determines which fields of a record are used.
        count: Number of prompts; fewer if the data has fewer, none if it has no prompts (plain documents).

    Returns:
        Messages up to the first user message, with a preceding system message if any. Short prompts if there are any.

    Raises:
        XTunerError: As in preparation, which reads the same records before.
    """
    prompts = _prompts(config, template)
    unique = list({tuple(message.content for message in prompt): prompt for prompt in prompts}.values())
    short = [prompt for prompt in unique if sum(len(message.content) for message in prompt) <= _SHORT_CHARACTERS]
    return (short or unique)[:count]


def _prompts(config: DatasetConfig, template: Template) -> Iterator[tuple[Message, ...]]:
    for conversation in islice(_conversations(config, template), _MAX_CONVERSATIONS):
        prompt = tuple(takewhile(lambda message: message.role in ('system', 'user'), conversation.messages))
        if prompt and prompt[-1].role == 'user' and not conversation.tools:
            yield tuple(Message(message.role, message.content) for message in prompt)


def _conversations(config: DatasetConfig, template: Template) -> Iterator[Conversation]:
    for source in open_sources(config.source):
        yield from map_records(source, config, Summary(), template)
