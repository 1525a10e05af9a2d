"""Writes a prompt template as the Jinja that is saved with a tokenizer."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner.dataset.templates.template import Template, Turn


def write_jinja(template: Template, system: Turn) -> str:
    """Returns a template as Jinja.

    Args:
        template: What to write.
        system: What stands around its system text.
    """
    turns = template.turns
    lines = [f'{{{{- {_expression(template.begin)} }}}}' if template.begin else '',
             "{%- set ns = namespace(round=0, system='') -%}"]  # fmt: skip
    if template.default_system:
        shown = _show_system(template, system, json.dumps(template.default_system))
        lines.append("{%- if messages[0]['role'] != 'system' -%}" + shown + '{%- endif -%}')
    lines += ['{%- for message in messages -%}', "{%- if message['role'] == 'system' -%}{%- if message['content'] -%}",
              _show_system(template, system, "message['content']"), '{%- endif -%}']  # fmt: skip
    for role, turn in turns.items():
        if role == 'system':
            continue
        own = "ns.system ~ message['content']" if role == 'user' else "message['content']"
        inner = [turn.before, turn.lead, own, turn.end, turn.after]
        shown = ' ~ '.join(part if part is own else _expression(part) for part in inner if part)
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


def _show_system(template: Template, turn: Turn, content: str) -> str:
    parts = [turn.before, content, turn.end, turn.after]
    shown = ' ~ '.join(part if part is content else _expression(part) for part in parts if part)
    return f'{{%- set ns.system = {shown} -%}}' if template.system_in_user else f'{{{{- {shown} }}}}'


_NAMES = {'{bos}': 'bos_token', '{eos}': 'eos_token', '{round}': 'ns.round'}


def _expression(text: str) -> str:
    """Writes a format string as a Jinja expression, such as `bos_token ~ "<|User|>:"`."""
    parts = [part for part in re.split(r'(\{bos\}|\{eos\}|\{round\})', text) if part]
    return ' ~ '.join(_NAMES.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)
