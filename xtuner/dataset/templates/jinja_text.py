"""Strings around the text of each role, and the Jinja chat template generated from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """Strings around the text of one role; each may contain `{bos}`, `{eos}` and `{round}` (from 1).

    Attributes:
        before: Precedes the text, written by the template; for an answer, this is the generation prompt.
        lead: Precedes an answer's text and is written by the model, so it is trained.
        end: Ends the text; written by the model and trained if the text is an answer.
        after: Separates the turn from the next one; never trained.
    """

    before: str = ''
    end: str = ''
    after: str = ''
    lead: str = ''


def write_jinja(
    turns: Mapping[str, Turn], *, begin: str = '', default_system: str = '', system_in_user: bool = False
) -> str:
    """Returns a template as Jinja.

    The arguments are the fields of `Template`.
    """
    system = turns.get('system', Turn())
    lines = [f'{{{{- {_expression(begin)} }}}}' if begin else '',
             "{%- set ns = namespace(round=0, system='') -%}"]  # fmt: skip
    if default_system:
        shown = _show_system(system, json.dumps(default_system), in_user=system_in_user)
        lines.append("{%- if messages[0]['role'] != 'system' -%}" + shown + '{%- endif -%}')
    lines += ['{%- for message in messages -%}', "{%- if message['role'] == 'system' -%}{%- if message['content'] -%}",
              _show_system(system, "message['content']", in_user=system_in_user), '{%- endif -%}']  # fmt: skip
    for role, turn in turns.items():
        if role == 'system':
            continue
        content = "ns.system ~ message['content']" if role == 'user' else "message['content']"
        inner = [turn.before, turn.lead, content, turn.end, turn.after]
        shown = ' ~ '.join(part if part is content else _expression(part) for part in inner if part)
        counted = '{%- set ns.round = ns.round + 1 -%}' if role == 'user' else ''
        reset = "{%- set ns.system = '' -%}" if role == 'user' else ''
        lines.append(f"{{%- elif message['role'] == '{role}' -%}}{counted}{{{{- {shown} }}}}{reset}")
    lines.append("{%- else -%}{{- raise_exception('no form for the role ' ~ message['role']) }}{%- endif -%}"
                 '{%- endfor -%}')  # fmt: skip
    if turns['assistant'].before:
        lines.append(
            f'{{%- if add_generation_prompt -%}}{{{{- {_expression(turns["assistant"].before)} }}}}{{%- endif -%}}'
        )
    return ''.join(lines)


def _show_system(turn: Turn, content: str, *, in_user: bool) -> str:
    parts = [turn.before, content, turn.end, turn.after]
    shown = ' ~ '.join(part if part is content else _expression(part) for part in parts if part)
    return f'{{%- set ns.system = {shown} -%}}' if in_user else f'{{{{- {shown} }}}}'


_NAMES = {'{bos}': 'bos_token', '{eos}': 'eos_token', '{round}': 'ns.round'}


def _expression(text: str) -> str:
    """Converts a format string to a Jinja expression, such as `bos_token ~ "<|User|>:"`."""
    parts = [part for part in re.split(r'(\{bos\}|\{eos\}|\{round\})', text) if part]
    return ' ~ '.join(_NAMES.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)
