"""Modelfiles for Ollama."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.adapters import make_base
from tests.convert.go_template import render
from tests.convert.test_gguf import fake  # noqa: F401
from xtuner.cli.main import main
from xtuner.convert.ollama import go_template, modelfile
from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.templates.builtin import TEMPLATES, get_template
from xtuner.errors import UsageError


class Tokenizer:
    bos_token, eos_token = '<s>', '</s>'


MESSAGES = [Message('system', 'Be "kind".'), Message('user', 'Hi <there>\n'), Message('assistant', 'Yes & {{ no }}'),
            Message('user', '你好')]  # fmt: skip


NO_FORM = {'chatglm2', 'internlm_chat_2023'}


@pytest.mark.parametrize('name', sorted(TEMPLATES.module_dict))
@pytest.mark.parametrize('messages', [MESSAGES, MESSAGES[1:], [Message('system', ''), MESSAGES[1]]])
def test_a_modelfile_has_the_format_of_training(name: str, messages: list[Message]) -> None:
    template = get_template(name)
    if name in NO_FORM:
        with pytest.raises(UsageError, match='cannot be a Modelfile'):
            go_template(template, Tokenizer)
        return
    expected = ''.join(piece.text for piece in template.render(Conversation(tuple(messages)), prompt=True))
    expected = expected.removeprefix('{bos}').replace('{bos}', '<s>').replace('{eos}', '</s>')
    if template.default_system and messages[0].role != 'system':  # Ollama puts a Modelfile's SYSTEM in front
        messages = [Message('system', template.default_system), *messages]
    given = [{'Role': message.role, 'Content': message.content} for message in messages]
    assert render(go_template(template, Tokenizer), given) == expected


def test_the_modelfile_of_internlm() -> None:
    assert modelfile(get_template('internlm_chat'), Tokenizer) == (
        'FROM ./model.gguf\n'
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}{{ if .Content }}{{ "<|System|>:" }}{{ .Content }}'
        '{{ "\\n" }}{{ end }}{{ else if eq .Role "user" }}{{ "<|User|>:" }}{{ .Content }}{{ "<eoh>\\n" }}'
        '{{ else if eq .Role "assistant" }}{{ "<|Bot|>:" }}{{ .Content }}{{ "<eoa>\\n" }}{{ end }}{{ end }}'
        '{{ "<|Bot|>:" }}"""\n'
        'PARAMETER stop "<eoa>"\n'
        'PARAMETER stop "</s>"\n'
    )


def test_an_interrupted_ollama_folder_is_gone_on_with(
    tmp_path: Path,
    fake: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after the GGUF file, and while a converter wrote beside it; another job begins anew."""
    base = make_base(tmp_path / 'base')
    words = ['convert', 'ollama', str(base), str(tmp_path / 'out'), '--template', 'internlm_chat', '--converter',
             str(fake)]  # fmt: skip
    write = Path.write_text

    def interrupted(self: Path, text: str, **options: str) -> int:
        if self.name == 'Modelfile':
            (self.parent / '.partial-killed').mkdir()
            raise KeyboardInterrupt
        return write(self, text, **options)

    monkeypatch.setattr(Path, 'write_text', interrupted)
    assert main(words) == 130
    monkeypatch.setattr(Path, 'write_text', write)
    assert not (tmp_path / 'out').exists()
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['Modelfile', 'model.gguf']
    assert (tmp_path / 'calls').read_text().count('\n') == 1
