"""What each choice of `convert merge --base` keeps of a QLoRA run, and what it gives up.

    python benchmarks/merge_fidelity.py BASE WORK_DIR [WORK_DIR ...] --data demo/identity.jsonl
        --questions demo/questions.jsonl --text docs/data.md docs/runs.md docs/serve.md [--dtype fp16]

The reference is the base as it was trained on (quantised), with the adapter. For it and for both merged models it
prints a row: how many greedy answers are those of the reference and those that were taught; on the trained tokens of
the first 16 samples of the data, how often the same token is likeliest, and the mean KL divergence; the same on the
texts that `merge` falls back on; the perplexity on other text, in windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.chat.load import ChatModel, open_chat_model
from xtuner.convert.merge import merge
from xtuner.convert.prompts import choose_prompts
from xtuner.convert.verify import compare
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX, Encoder
from xtuner.inference.generate import Sampling

NUM_SAMPLES = 16
WINDOW, MOST_TOKENS = 256, 4096  # of the other text
GREEDY = Sampling(max_new_tokens=40, temperature=0.0, top_p=1.0, seed=0)


@dataclass(frozen=True)
class Material:
    """What every model is asked and shown."""

    questions: list[dict[str, str]]
    records: list[dict[str, object]]
    text: str
    base: Path


@dataclass(frozen=True)
class Look:
    """What one model does with it: its answers, its logits on trained tokens and on our texts, its perplexity."""

    answers: list[str]
    trained: Tensor
    shipped: Tensor
    perplexity: float


@torch.inference_mode()
def logits(chat: ChatModel, ids: Tensor) -> Tensor:
    return chat.model(input_ids=ids[None], use_cache=False).logits[0].float()


def look(chat: ChatModel, material: Material) -> Look:
    session = chat.session(sampling=GREEDY)
    answers = []
    for question in material.questions:
        session.clear()
        answers.append(session.ask(question['question'], lambda _: None).strip())
    trained = []
    conversations = [to_conversation(record, 'the data') for record in material.records]
    for sample in Encoder(chat.tokenizer, chat.template).encode(conversations):
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        trained.append(logits(chat, ids)[:-1][labels[1:] != IGNORE_INDEX])
    prompts = choose_prompts(material.base, None, 8, chat.model.config.vocab_size)
    rows = zip(prompts.ids, prompts.counted, strict=True)
    shipped = [logits(chat, ids)[counted] for ids, counted in rows]
    return Look(answers, torch.cat(trained), torch.cat(shipped), perplexity(chat, material.text))


def perplexity(chat: ChatModel, text: str) -> float:
    ids = torch.tensor(chat.tokenizer(text).input_ids[:MOST_TOKENS])
    windows = [window for window in ids.split(WINDOW) if len(window) > 1]
    losses = [float(F.cross_entropy(logits(chat, window)[:-1], window[1:], reduction='sum')) for window in windows]
    return math.exp(sum(losses) / sum(len(window) - 1 for window in windows))


def report(name: str, found: Look, reference: Look, material: Material) -> None:
    taught = sum(a == question['answer'] for a, question in zip(found.answers, material.questions, strict=True))
    same = sum(a == b for a, b in zip(found.answers, reference.answers, strict=True))
    on_trained, on_shipped = compare(reference.trained, found.trained), compare(reference.shipped, found.shipped)
    print(f'| {name} | {same} | {taught} | {100 * on_trained.agreement:.1f} % | {on_trained.kl:.2g} | '
          f'{100 * on_shipped.agreement:.1f} % | {on_shipped.kl:.2g} | {found.perplexity:.1f} |',
          flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('base', type=Path)
    parser.add_argument('runs', type=Path, nargs='+', metavar='WORK_DIR')
    parser.add_argument('--data', type=Path, required=True, help='JSON lines with `messages`')
    parser.add_argument('--questions', type=Path, required=True, help='JSON lines with `question` and `answer`')
    parser.add_argument('--text', type=Path, nargs='+', required=True)
    parser.add_argument('--dtype', default='fp16')
    args = parser.parse_args()
    questions, records = ([json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
                          for file in (args.questions, args.data))  # fmt: skip
    text = '\n'.join(file.read_text(encoding='utf-8') for file in args.text)
    material = Material(questions, records[:NUM_SAMPLES], text, args.base)
    print(f'| model | answers as the reference, of {len(questions)} | taught answers | same likeliest token, trained '
          'tokens | KL | same, our texts | KL | perplexity, other text |\n' + '| --- ' * 8 + '|')  # fmt: skip
    for run in args.runs:
        reference = look(open_chat_model(str(args.base), adapter=run), material)
        report(f'{run.name}: reference', reference, reference, material)
        for kind in ('original', 'dequantized'):
            out = Path(tempfile.mkdtemp()) / 'merged'
            merge(str(args.base), run, out, base=kind, dtype=args.dtype, verify=0)
            report(f'{run.name}: {kind}', look(open_chat_model(str(out)), material), reference, material)
            shutil.rmtree(out.parent)


if __name__ == '__main__':
    main()
