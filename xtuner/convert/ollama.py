r"""Exports a folder for `ollama create`: the GGUF file and a Modelfile with the same prompt format.

The prompt template becomes a Go template with quoted strings, independent of Go's whitespace trimming:

    {{ range .Messages }}{{ if eq .Role "user" }}{{ "<|User|>:" }}{{ .Content }}{{ "<eoh>\n" }}...{{ end }}{{ end }}{{
    "<|Bot|>:" }}
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from xtuner import __version__
from xtuner.adapters.attach import read_provenance
from xtuner.convert.gguf import to_gguf
from xtuner.convert.output import atomic_folder, check_output
from xtuner.dataset.templates.builtin import get_template
from xtuner.dataset.templates.template import Template, Turn
from xtuner.errors import UsageError
from xtuner.model.loading import load_tokenizer, resolve_model

_FILE = 'model.gguf'


def to_ollama(
    model: str, out: Path, *, template: str | None = None, out_type: str = 'auto', converter: Path | None = None
) -> Path:
    """Writes `model.gguf` and `Modelfile` into a folder.

    Args:
        model: A model folder, such as one written by `merge`, or a hub id.
        out: A missing or empty folder. It appears only once it is complete.
        template: Name of the prompt template; None uses the one that the model was trained with.
        out_type: See `to_gguf`.
        converter: See `to_gguf`.

    Returns:
        `out`.

    Raises:
        UsageError: The template is unknown, or cannot be expressed in Go.
        ModelError: As for `to_gguf`.
    """
    check_output(out)
    source = resolve_model(model)
    provenance = read_provenance(source)
    name = template or (provenance.template if provenance else None)
    if name is None:
        raise UsageError(f'{model} does not record its prompt template; name one with --template')
    tokenizer = load_tokenizer(source)
    text = modelfile(get_template(name, tokenizer), tokenizer)
    with atomic_folder(out, ['ollama', __version__, str(source.resolve()), text, out_type, str(converter)]) as folder:
        for left in folder.glob('.partial-*'):  # left by a killed converter
            shutil.rmtree(left)
        if not (folder / _FILE).is_file():  # if present, an interrupted run of this job completed it
            to_gguf(model, folder / _FILE, out_type=out_type, converter=converter)
        (folder / 'Modelfile').write_text(text, encoding='utf-8')
    return out


def modelfile(template: Template, tokenizer: Any) -> str:
    """Returns the Modelfile: path of the weights, prompt format, stop words.

    Args:
        template: The prompt format.
        tokenizer: The model's tokenizer.

    Raises:
        UsageError: The template cannot be expressed in Go.
    """
    stops = dict.fromkeys((*template.stop, tokenizer.eos_token))
    lines = [f'FROM ./{_FILE}', f'TEMPLATE """{go_template(template, tokenizer)}"""']
    if template.default_system:
        lines.append(f'SYSTEM """{template.default_system}"""')
    lines += [f'PARAMETER stop {_quoted(stop)}' for stop in stops if stop]
    return '\n'.join(lines) + '\n'


def go_template(template: Template, tokenizer: Any) -> str:
    """Returns the prompt format as a Go text/template over Ollama's `.Messages`.

    A BOS at the start is omitted, because llama.cpp adds it.

    Raises:
        UsageError: The format counts rounds, depends on a question's position, or is the tokenizer's own.
    """
    everything = [
        template.begin,
        *(text for t in template.turns.values() for text in (t.before, t.lead, t.end, t.after)),
    ]
    if type(template) is not Template or any('{round}' in text for text in everything):
        raise UsageError(f'template {template.name!r} cannot be a Modelfile: it is more than strings around texts')

    def literal(text: str) -> str:
        """Inserts the tokenizer's BOS and EOS."""
        return text.replace('{bos}', tokenizer.bos_token or '').replace('{eos}', tokenizer.eos_token or '')

    def shown(text: str) -> str:
        """The template action that writes a text; empty for an empty text."""
        return f'{{{{ {_quoted(literal(text))} }}}}' if text else ''

    parts = [shown(template.begin.removeprefix('{bos}'))]
    if template.system_in_user:
        parts.append('{{ $system := "" }}')
    parts.append('{{ range .Messages }}')
    for number, (role, turn) in enumerate(template.turns.items()):
        parts.append(f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}')
        if role == 'system':
            parts.append(_system(turn, literal, template.system_in_user))
            continue
        content = '{{ .Content }}'
        if role == 'user' and template.system_in_user:
            content = '{{ $system }}{{ .Content }}{{ $system = "" }}'
        parts += [shown(turn.before + turn.lead), content, shown(turn.end + turn.after)]
    parts += ['{{ end }}{{ end }}', shown(template.turns['assistant'].before)]
    return ''.join(parts)


def _system(turn: Turn, literal: Any, deferred: bool) -> str:
    """Writes a system message in place, or defers it to the next user message; skips an empty one."""
    before, after = _quoted(literal(turn.before)), _quoted(literal(turn.end + turn.after))
    if deferred:
        inner = f'{{{{ $system = printf "%s%s%s" {before} .Content {after} }}}}'
    else:
        inner = f'{{{{ {before} }}}}{{{{ .Content }}}}{{{{ {after} }}}}'
    return f'{{{{ if .Content }}}}{inner}{{{{ end }}}}'


def _quoted(text: str) -> str:
    """Quotes a string for Go and for a Modelfile; JSON escapes are valid in Go."""
    return json.dumps(text, ensure_ascii=False)
