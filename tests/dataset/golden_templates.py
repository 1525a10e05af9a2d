"""What each template makes of five conversations; `python -m tests.dataset.golden_templates` writes the files.

In `shown`, what is trained stands between « and ».
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.dataset.conftest import all_markers
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_conversation
from xtuner.dataset.templates.builtin import TEMPLATES, get_template

FOLDER = Path(__file__).parent / 'golden'
_ASK = {'role': 'user', 'content': 'Who are you?'}
_ANSWER = {'role': 'assistant', 'content': 'A model.\n'}
CASES: dict[str, list[dict[str, Any]]] = {
    'one turn': [_ASK, _ANSWER],
    'two turns': [
        _ASK,
        _ANSWER,
        {'role': 'user', 'content': ' Really? </s>'},
        {'role': 'assistant', 'content': 'Yes.'},
    ],
    'system': [{'role': 'system', 'content': 'Be brief.'}, _ASK, _ANSWER],
    'empty system': [{'role': 'system', 'content': ''}, _ASK, _ANSWER],
    'prompt without answer': [_ASK, _ANSWER, _ASK],
}


def golden_tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, a few merges, then the control tokens, so that a new template moves no id of the others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ('Ċ', 'Ċ'),
        ('Ġ', 'Y'),
        ('o', 'u'),
        ('y', 'ou'),
        (':', 'Ċ'),
        ('R', 'e'),
        ('.', 'Ċ'),
        ('Ġ', 'a'),
        (':', 'W'),
    ]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ('<s>', '</s>', *all_markers())])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>', pad_token='</s>')


def render(name: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The content of one golden file."""
    template = get_template(name, tokenizer)
    found: dict[str, Any] = {'stop_ids': template.stop_ids(tokenizer)}
    for case, messages in CASES.items():
        sample = encode_conversation(to_conversation({'messages': messages}), tokenizer, template)
        trained = (sample.labels != -100).astype(int).tolist()
        found[case] = {'shown': show(sample.input_ids.tolist(), trained, tokenizer), 'ids': sample.input_ids.tolist(),
                       'trained': ''.join(map(str, trained))}  # fmt: skip
    return found


def show(ids: list[int], trained: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    text, inside = '', 0
    start = 0
    for end in range(len(ids) + 1):
        if end == len(ids) or trained[end] != inside:
            text += tokenizer.decode(ids[start:end])
            if end < len(ids) or inside:
                text += '»' if inside else '«'
            start, inside = end, 1 - inside
    return text


if __name__ == '__main__':
    FOLDER.mkdir(exist_ok=True)
    for template_name in TEMPLATES.module_dict:
        content = json.dumps(render(template_name, golden_tokenizer()), ensure_ascii=False)
        lines = content.replace('"ids": ', '\n  "ids": ').replace('}, "', '},\n"').replace(': {"shown"', ':\n {"shown"')
        (FOLDER / f'{template_name}.json').write_text(lines + '\n', encoding='utf-8')
