"""A conversation with a model that was trained on MOSS's plugins: it thinks, calls tools, answers with what they gave.

<|Human|>: ...<eoh>
<|Inner Thoughts|>: ...<eot>           the model writes these two and stops at <eoc>
<|Commands|>: Calculate("1+2")<eoc>
<|Results|>: Calculate("1+2") => 3<eor>       the tools' part
<|MOSS|>: It is 3.<eom>                       the model again
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.chat.plugins.base import Plugin, PluginError
from xtuner.chat.session import ChatSession
from xtuner.dataset.conversation import Message
from xtuner.errors import UsageError

TEMPLATE = 'moss_sft'
_NOTHING = 'None'  # what MOSS writes in a part without content
_MOST_CALLS = 4  # of one turn; those beyond are answered with an error
_ANSWER = '<|MOSS|>:'
_PARTS = {'Inner Thoughts': 'thoughts', 'Commands': 'commands', 'MOSS': 'assistant'}
_PART = re.compile(r'<\|(Inner Thoughts|Commands|MOSS)\|>: ?(.*?)(?:<eo[tcm]>|(?=<\|)|$)', re.DOTALL)
_CALL = re.compile(r'([A-Za-z][A-Za-z0-9]*)\(\s*"((?:[^"\\]|\\.)*)"\s*\)|([A-Za-z][A-Za-z0-9]*)\(\s*\'([^\']*)\'\s*\)')
# The tools as MOSS's prompt lists them: title and form of a call.
_TOOLS = (
    ('Web search', 'Search(query)'),
    ('Calculator', 'Calculate(expression)'),
    ('Equation solver', 'Solve(equation)'),
    ('Text-to-image', 'Text2Image(description)'),
    ('Image edition', 'ImageEdit(description)'),
    ('Text-to-speech', 'Text2Speech(text)'),
)


@dataclass(frozen=True)
class Call:
    """A tool's name and its argument, as the model wrote them."""

    name: str
    argument: str

    def __str__(self) -> str:
        return f'{self.name}("{self.argument}")'


def tool_list(plugins: Sequence[Plugin]) -> str:
    """The end of MOSS's system message: which tools it may call."""
    names = {plugin.name for plugin in plugins}
    lines = ['Capabilities and tools that MOSS can possess.', '- Inner thoughts: enabled.']
    for title, form in _TOOLS:
        on = form.partition('(')[0] in names
        lines.append(f'- {title}: enabled. API: {form}' if on else f'- {title}: disabled.')
    return '\n'.join(lines)


def find_calls(commands: str) -> list[Call]:
    """The calls in what a model wrote as commands; none in `None`."""
    found = [Call(a or c, b if a else d) for a, b, c, d in _CALL.findall(commands)]
    return [Call(call.name, call.argument.replace('\\"', '"')) for call in found]


class MossSession(ChatSession):
    """A chat whose model may call tools.

    Args:
        on_call: Told each call and its result, for the user to see.
        plugins: The tools.
        keywords: As for `ChatSession`; the template must be MOSS's.

    Raises:
        UsageError: the template is another one.
    """

    def __init__(
        self, *args: Any, plugins: Sequence[Plugin], on_call: Callable[[Call, str], None], **keywords: Any
    ) -> None:
        super().__init__(*args, **keywords)
        if self._template.name != TEMPLATE:
            raise UsageError(
                f'plugins are for models trained in the form of MOSS: this one has the template '
                f'{self._template.name!r}; if it is one, pass --prompt-template {TEMPLATE}'
            )
        self._plugins = {plugin.name: plugin for plugin in plugins}
        self._tools = tool_list(plugins)
        self._on_call = on_call

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        """As `ChatSession.ask`; only the answer is shown, thoughts and calls are kept in the history beside it."""
        messages, prompt_ids = self._fit([*self.history, Message('user', text)])
        written = self._say(prompt_ids, AnswerFilter(on_text).put)
        parts = read_parts(written)
        messages += [Message(role, parts[role] or _NOTHING) for role in ('thoughts', 'commands') if role in parts]
        if 'commands' in parts and 'assistant' not in parts:
            messages.append(Message('tool', self._results(parts['commands'])))
            messages, prompt_ids = self._fit(messages)
            written = self._say(prompt_ids, AnswerFilter(on_text).put)
            parts = read_parts(written)
        answer = parts.get('assistant', '' if parts else written.strip())
        if not parts:
            on_text(answer)  # in no form that is known: shown as it is
        self.history = [*messages, Message('assistant', answer)]
        return answer

    def _results(self, commands: str) -> str:
        calls = find_calls(commands)
        lines = [self._result(call, number) for number, call in enumerate(calls)]
        return '\n'.join(lines) or _NOTHING

    def _result(self, call: Call, number: int) -> str:
        plugin = self._plugins.get(call.name)
        try:
            if plugin is None:
                raise PluginError(f'{call.name} is not enabled')
            if number >= _MOST_CALLS:
                raise PluginError(f'more than {_MOST_CALLS} calls at once')
            result = plugin.run(call.argument)
        except PluginError as error:
            result = f'error: {error}'
        self._on_call(call, result)
        return f'{call} =>{chr(10) if chr(10) in result or result.startswith("<|") else " "}{result}'

    def _with_system(self, messages: list[Message]) -> list[Message]:
        system = f'{self.system}\n{self._tools}' if self.system else self._tools
        return [Message('system', system), *messages]


def read_parts(written: str) -> dict[str, str]:
    """What a model wrote, by role: the first part of each."""
    found: dict[str, str] = {}
    for name, content in _PART.findall(written):
        found.setdefault(_PARTS[name], content.strip())
    return found


class AnswerFilter:
    """Passes on what comes after the answer's marker, and of that nothing that may be the beginning of a marker."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._text, self._shown, self._from = '', 0, -1

    def put(self, piece: str) -> None:
        """Takes a piece of what the model writes."""
        self._text += piece
        if self._from < 0:
            at = self._text.find(_ANSWER)
            if at < 0:
                return
            self._from = at + len(_ANSWER)
        answer = self._text[self._from :].lstrip()
        if answer[self._shown :]:
            self._on_text(answer[self._shown :])
            self._shown = len(answer)
