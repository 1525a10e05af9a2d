"""The model card of an adapter or a model, `README.md` on the hub, written from `xtuner.json`.

It contains no information about the machine; for local paths only their last part.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from xtuner.adapters.attach import Provenance
from xtuner.adapters.trained_base import merged_note, precision_text
from xtuner.dataset.templates.from_tokenizer import prompt_text
from xtuner.errors import ConfigError, DataError
from xtuner.utils.escape import printable

CARD_FILE = 'README.md'
_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_MAX_ID_LENGTH = 193  # characters: two names of 96
_LABELS = {
    'method': 'method', 'conversations': 'conversations', 'tokens': 'tokens in them',
    'target_tokens': 'tokens trained', 'train_on': 'what is trained', 'max_length': 'tokens a pack', 'steps': 'steps',
    'epochs': 'epochs', 'tokens_per_step': 'tokens a step, at most', 'learning_rate': 'learning rate',
    'objective': 'objective', 'decay': 'decay of the learning rate', 'warmup_steps': 'warm-up steps',
    'optimizer': 'optimizer',
    'adapter': 'adapter', 'precision': 'computed in', 'seed': 'seed', 'step': 'step of this checkpoint',
    'loss': 'loss at that step', 'val_loss': 'validation loss', 'versions': 'versions',
}  # fmt: skip


def hub_id(name: str) -> str | None:
    """Returns `name` if it is a Hugging Face hub id, None for a local path."""
    return name if len(name) <= _MAX_ID_LENGTH and _ID.fullmatch(name) and not Path(name).exists() else None


def public_name(name: str) -> str:
    """Returns a hub id unchanged and only the last part of a path, since the rest is private."""
    return hub_id(name) or Path(name).name or name


def prompt_example(tokenizer: Any) -> str:
    """A short conversation as rendered by the tokenizer, up to the start of an answer; '' without a template."""
    if not getattr(tokenizer, 'chat_template', None):
        return ''
    messages = [
        {'role': 'user', 'content': 'Hello'},
        {'role': 'assistant', 'content': 'Hello! How can I help?'},
        {'role': 'user', 'content': 'What is LoRA?'},
    ]
    try:
        return prompt_text(tokenizer, messages)
    except (ConfigError, DataError):  # a template may reject it or be invalid: the card then has no example
        return ''


def write_card(folder: Path, provenance: Provenance, *, kind: str, example: str = '') -> None:
    """Writes `README.md`, replacing one that peft may have written.

    Args:
        folder: The adapter's or model's folder.
        provenance: Training metadata.
        kind: 'adapter', 'merged' (an adapter merged into its base) or 'full' (all weights trained).
        example: A conversation in the prompt format, shown verbatim.
    """
    (folder / CARD_FILE).write_text(render_card(provenance, kind=kind, example=example), encoding='utf-8')


def render_card(provenance: Provenance, *, kind: str, example: str = '') -> str:
    """Returns the card's text; see `write_card`."""
    training = provenance.training or {}
    sources = [str(source) for source in training.get('data', [])]
    parts = [
        f'---\n{_metadata(provenance, kind, sources).to_yaml()}\n---\n',
        f'# {_title(provenance, sources)}\n',
        _what(provenance, kind, sources, training),
        '## Use\n\n' + _use(provenance, kind),
    ]
    if example:
        parts.append(
            '## Prompt format\n\nThe chat template of the tokenizer in this folder renders it as follows '
            f'({_code(provenance.template)}):\n\n{_fenced(example)}'
        )
    rows = [(label, training[key]) for key, label in _LABELS.items() if training.get(key) is not None]
    if rows:
        parts.append('## Training\n\n' + _table(rows))
    return '\n'.join(parts)


def _metadata(provenance: Provenance, kind: str, sources: list[str]) -> ModelCardData:
    method = 'full' if kind == 'full' else 'qlora' if provenance.quantization else 'lora'
    ids = [source for source in map(hub_id, sources) if source]
    return ModelCardData(
        base_model=hub_id(provenance.base),
        base_model_relation={'adapter': 'adapter'}.get(kind, 'finetune') if hub_id(provenance.base) else None,
        library_name='peft' if kind == 'adapter' else 'transformers',
        pipeline_tag='text-generation',
        datasets=ids or None,
        tags=['xtuner', 'conversational', *([] if method == 'full' else ['lora', *(['qlora'] * (method == 'qlora'))])],
    )


def _title(provenance: Provenance, sources: list[str]) -> str:
    name = public_name(provenance.base).rpartition('/')[2]
    on = ', '.join(public_name(source).rpartition('/')[2] for source in sources)
    return _plain(f'{name}, tuned on {on}' if on else f'{name}, tuned')


def _what(provenance: Provenance, kind: str, sources: list[str], training: Mapping[str, Any]) -> str:
    what = {
        'adapter': 'An adapter for',
        'merged': 'An adapter merged into',
        'full': 'All weights tuned, beginning with',
    }[kind]
    count = f', {training["conversations"]:,} conversations' if isinstance(training.get('conversations'), int) else ''
    on = f' on {", ".join(_linked(source, "datasets/") for source in sources)}{count}' if sources else ''
    note = merged_note(provenance)
    if not note and provenance.quantization:
        note = f'the base was kept {precision_text(provenance.quantization)} in training'
    how = f' {note[0].upper()}{note[1:]}.' if note else ''
    fingerprint = _code(str(provenance.base_fingerprint)[:16])
    return (
        f'{what} {_linked(provenance.base)}, trained with xtuner {_plain(provenance.xtuner)}{on}. The base is '
        f'identified by the fingerprint of its weights, {fingerprint}: xtuner rejects any other.{how}\n'
    )


def _use(provenance: Provenance, kind: str) -> str:
    base = printable(' '.join(public_name(provenance.base).split()))
    if kind == 'adapter':
        word = shlex.quote(base)
        commands = f'xtuner chat {word} --adapter FOLDER\nxtuner convert merge {word} FOLDER merged'
        load = (
            'from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
            f"base = AutoModelForCausalLM.from_pretrained({base!r}, dtype='auto')\n"
            "model = PeftModel.from_pretrained(base, 'FOLDER')\n"
            "tokenizer = AutoTokenizer.from_pretrained('FOLDER')"
        )
    else:
        commands = 'xtuner chat FOLDER'
        load = (
            'from transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
            "model = AutoModelForCausalLM.from_pretrained('FOLDER', dtype='auto')\n"
            "tokenizer = AutoTokenizer.from_pretrained('FOLDER')"
        )
    note = 'For InternLM, `import xtuner.model.loading` first: it registers the model without code from '
    return f'FOLDER is the folder of this card.\n\n{_fenced(commands)}\n{_fenced(load, "python")}\n{note}the hub.\n'


def _linked(name: str, where: str = '') -> str:
    id_ = hub_id(name)
    return f'[{id_}](https://huggingface.co/{where}{id_})' if id_ else _plain(public_name(name))


def _code(content: object) -> str:
    """Inline code with a delimiter that its content cannot end."""
    shown = printable(' '.join(str(content).split()))
    ticks = '`' * (1 + max((len(run) for run in re.findall(r'`+', shown)), default=0))
    return f'{ticks} {shown} {ticks}' if len(ticks) > 1 else f'`{shown}`'


def _fenced(content: str, language: str = '') -> str:
    """A code block with a fence that its content cannot end."""
    longest = max((len(run) for run in re.findall(r'`+', content)), default=0)
    fence = '`' * max(3, longest + 1)
    return f'{fence}{language}\n{printable(content)}\n{fence}\n'


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f'| {label} | {_plain(_value_text(value))} |' for label, value in rows]
    return '\n'.join(['| | |', '| --- | --- |', *lines]) + '\n'


def _value_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, Mapping):
            return ', '.join(f'{k} {_value_text(v)}' for k, v in value.items())
        return ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


def _plain(content: str) -> str:
    """Escapes Markdown and HTML, on one line.

    In URLs the colon and dots become character references, since GitHub and the hub would otherwise create links.
    """
    line = re.sub(r'([\\`*_|<>\[\]~!$@&])', r'\\\1', printable(' '.join(str(content).split())))
    return re.sub(r'www\.|:(?=//)', lambda match: match.group().replace('.', '&#46;').replace(':', '&#58;'), line,
                  flags=re.IGNORECASE)  # fmt: skip
