r"""A folder that `ollama create` takes: the GGUF file and a Modelfile with the same prompt format.

A template becomes one of Go's, its strings quoted, so that no newline depends on how Go trims:

    {{ range .Messages }}{{ if eq .Role "user" }}{{ "<|User|>:" }}{{ .Content }}{{ "<eoh>\n" }}...{{ end }}{{ end }}{{ "<|Bot|>:" }}
"""  # noqa: E501

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from xtuner import __version__
from xtuner.adapters.attach import read_provenance
from xtuner.convert.gguf import to_gguf
from xtuner.convert.output import check_output, whole_folder
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
        model: A model's folder, such as one that `merge` wrote, or a hub id.
        out: A folder that is missing or empty. It appears as a whole at the end.
        template: Name of the prompt template; None takes the one that the model was tuned with.
        out_type: As for `to_gguf`.
        converter: As for `to_gguf`.

    Returns:
        `out`.

    Raises:
        UsageError: no template is known, or it has no form in Go.
        ModelError: as `to_gguf`.
    """
    check_output(out)
    source = resolve_model(model)
    provenance = read_provenance(source)
    name = template or (provenance.template if provenance else None)
    if name is None:
        raise UsageError(f'{model} does not say which template it was tuned with; give one by --template')
    tokenizer = load_tokenizer(source)
    text = modelfile(get_template(name, tokenizer), tokenizer)
    with whole_folder(out, ['ollama', __version__, str(source.resolve()), text, out_type, str(converter)]) as folder:
        for left in folder.glob('.partial-*'):  # by a converter that was killed
            shutil.rmtree(left)
        if not (folder / _FILE).is_file():  # else an interrupted run of this job has written it; it appears as a whole
            to_gguf(model, folder / _FILE, out_type=out_type, converter=converter)
        (folder / 'Modelfile').write_text(text, encoding='utf-8')
    return out


def modelfile(template: Template, tokenizer: Any) -> str:
    """The Modelfile: where the weights are, the prompt format, where an answer stops.

    Args:
        template: The prompt format.
        tokenizer: The model's tokenizer.

    Raises:
        UsageError: the template has no form in Go.
    """
    stops = dict.fromkeys((*template.stop, tokenizer.eos_token))
    lines = [f'FROM ./{_FILE}', f'TEMPLATE """{go_template(template, tokenizer)}"""']
    if template.default_system:
        lines.append(f'SYSTEM """{template.default_system}"""')
    lines += [f'PARAMETER stop {_quoted(stop)}' for stop in stops if stop]
    return '\n'.join(lines) + '\n'


def go_template(template: Template, tokenizer: Any) -> str:
    """The prompt format in the language of Go's text/template, over Ollama's `.Messages`.

    A begin token at the very start is left out: llama.cpp puts it there itself.

    Raises:
        UsageError: the format counts its rounds, changes with the place of a question, or is the tokenizer's own.
    """
    everything = [
        template.begin,
        *(text for t in template.turns.values() for text in (t.before, t.lead, t.end, t.after)),
    ]
    if type(template) is not Template or any('{round}' in text for text in everything):
        raise UsageError(f'template {template.name!r} has no form in a Modelfile: it is more than strings around texts')

    def literal(text: str) -> str:
        """A template's text with the tokenizer's own beginning and end in it."""
        return text.replace('{bos}', tokenizer.bos_token or '').replace('{eos}', tokenizer.eos_token or '')

    def shown(text: str) -> str:
        """The action by which a Modelfile writes a text; nothing for none."""
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
        own = '{{ .Content }}'
        if role == 'user' and template.system_in_user:
            own = '{{ $system }}{{ .Content }}{{ $system = "" }}'
        parts += [shown(turn.before + turn.lead), own, shown(turn.end + turn.after)]
    parts += ['{{ end }}{{ end }}', shown(template.turns['assistant'].before)]
    return ''.join(parts)


def _system(turn: Turn, literal: Any, kept: bool) -> str:
    """A system message, shown where it stands, or kept for the next question; an empty one is none."""
    before, after = _quoted(literal(turn.before)), _quoted(literal(turn.end + turn.after))
    if kept:
        inner = f'{{{{ $system = printf "%s%s%s" {before} .Content {after} }}}}'
    else:
        inner = f'{{{{ {before} }}}}{{{{ .Content }}}}{{{{ {after} }}}}'
    return f'{{{{ if .Content }}}}{inner}{{{{ end }}}}'


def _quoted(text: str) -> str:
    """A string of Go, and of a Modelfile; JSON's escapes are Go's too."""
    return json.dumps(text, ensure_ascii=False)
