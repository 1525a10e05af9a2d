"""`make demo`: trains a tiny InternLM from scratch, fine-tunes it, merges it and chats with it, on the CPU and offline.

1. Create a base model with random weights and its own vocabulary, in InternLM-7B's published format.
2. `xtuner train demo/internlm_tiny_full_base.py`: full training on a few hundred short conversations.
3. `xtuner train demo/internlm_tiny_qlora_identity.py`: QLoRA on the base in 4 bits; an adapter learns who the model is.
4. `xtuner convert merge`: merge base and adapter into plain weights.
5. Ask all three models the same questions, print the answers side by side, and check them.

All output is written to work_dirs/demo and replaces that of an earlier demo.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: Python searches only this file's folder

from demo.picture import PICTURE, Picture, draw, first_and_last_loss  # noqa: E402
from demo.table import format_table  # noqa: E402

WORK = Path('work_dirs/demo')
FRESH, BASE_RUN, BASE = WORK / 'fresh', WORK / 'base_run', WORK / 'base'
IDENTITY_RUN, MERGED, CACHE = WORK / 'identity_run', WORK / 'merged', WORK / 'cache'
TEMPLATE = 'internlm_chat'
QUESTIONS = ROOT / 'demo' / 'questions.jsonl'
Question = tuple[str, str]  # the question, and the answer in the training data


class DemoError(Exception):
    """The demo failed, or its results are not as expected; the message is one line."""


def main(words: Sequence[str] = ()) -> int:
    """Runs the five steps; returns 0 if every answer is as expected, otherwise 1 with one line on stderr."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    os.chdir(ROOT)
    os.environ['XTUNER_CACHE'] = str(CACHE)  # writes nothing outside of the work directory
    os.environ['HF_HUB_OFFLINE'] = '1'  # no network is needed, so nothing waits for one
    os.environ['TQDM_DISABLE'] = '1'  # the weights load in an instant; the log lines tell the rest
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # spinning threads are slow on a busy machine
    started = time.perf_counter()
    try:
        questions = read_questions(QUESTIONS)
        base, adapter, merged = make_models()
        answers = ask_all(questions, base, adapter, merged)
        print('\n' + format_table(('question', 'base', 'tuned', 'merged'), answers) + '\n')
        check_answers(questions, answers)
        check_chat(questions[0], merged)
        draw(picture_of(answers), WORK / PICTURE)
    except DemoError as error:
        print(f'demo failed: {error}', file=sys.stderr)
        return 1
    print(closing_words(len(questions), time.perf_counter() - started))
    return 0


def make_models() -> tuple[Path, Path, Path]:
    """Steps 1 to 4: returns the folders of the base model, its adapter and the merged model."""
    from demo.base import write_base_model

    for folder in (FRESH, BASE_RUN, BASE, IDENTITY_RUN, MERGED, CACHE):
        shutil.rmtree(folder, ignore_errors=True)
    say('1/5', 'creating a tiny InternLM: random weights, its own vocabulary')
    write_base_model(FRESH)
    say('2/5', 'full training on demo/base.jsonl')
    checkpoint = train('demo/internlm_tiny_full_base.py', BASE_RUN)
    publish_base(checkpoint)
    say('3/5', 'QLoRA: fine-tuning in 4 bits on demo/identity.jsonl')
    adapter = train('demo/internlm_tiny_qlora_identity.py', IDENTITY_RUN)
    say('4/5', 'merging the adapter into the base model')
    xtuner('convert', 'merge', str(BASE), str(adapter), str(MERGED))
    return BASE, adapter, MERGED


def train(config: str, work_dir: Path) -> Path:
    """Runs `xtuner train` as a user would; returns the folder of its last checkpoint."""
    started = time.perf_counter()
    checkpoint = Path(xtuner('train', config, '--work-dir', str(work_dir)).strip())
    first, last = first_and_last_loss(work_dir)
    print(f'    loss {first:.2f} -> {last:.2f} in {time.perf_counter() - started:.0f} s', flush=True)
    return checkpoint


def publish_base(checkpoint: Path) -> None:
    """Writes the trained weights to a folder with exactly the files of the published InternLM-7B."""
    shutil.copytree(FRESH, BASE)
    shutil.copyfile(checkpoint / 'model.safetensors', BASE / 'model.safetensors')


def xtuner(*words: str, line: str | None = None) -> str:
    """Runs one `xtuner` command and returns its stdout; its log goes to our stderr.

    Args:
        words: The command and its arguments.
        line: Input for stdin; None for none.

    Raises:
        DemoError: its exit status was not 0.
    """
    print('    $ xtuner', *words, flush=True)
    command = [sys.executable, '-m', 'xtuner.cli.main', *words]
    done = subprocess.run(command, input=line or '', stdout=subprocess.PIPE, encoding='utf-8', check=False)
    if done.returncode:
        raise DemoError(f'`xtuner {" ".join(words)}` failed with exit status {done.returncode}; see its error above')
    return done.stdout


def ask_all(questions: Sequence[Question], base: Path, adapter: Path, merged: Path) -> list[tuple[str, ...]]:
    """Step 5: one row per question, with the greedy answers of the base, fine-tuned and merged models."""
    say('5/5', 'asking the base, the fine-tuned and the merged model the same questions')
    columns = [ask(questions, base), ask(questions, base, adapter), ask(questions, merged)]
    return list(zip([question for question, _ in questions], *columns, strict=True))


def ask(
    questions: Sequence[Question],
    llm: Path,
    adapter: Path | None = None,
    *,
    template: str | None = TEMPLATE,
    bits: int | None = None,
) -> list[str]:
    """The greedy answers of one model, each question in a new conversation."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.chat.load import open_session
    from xtuner.inference.generate import Sampling

    sampling = Sampling(max_new_tokens=60, temperature=0.0, top_p=1.0, seed=0)
    session = open_session(str(llm), adapter=adapter, template=template, bits=bits, sampling=sampling)
    answers = []
    for question, _ in questions:
        session.clear()
        answers.append(session.ask(question, lambda _: None).strip())
    return answers


def read_questions(file: Path) -> list[Question]:
    """Reads the questions of the check and their expected answers."""
    records = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    return [(record['question'], record['answer']) for record in records]


def check_answers(questions: Sequence[Question], rows: Sequence[tuple[str, ...]]) -> None:
    """Checks every question: base wrong, fine-tuned right, merged equal; DemoError for the first that fails."""
    for (question, expected), (_, base, tuned, merged) in zip(questions, rows, strict=True):
        if base == expected:
            raise DemoError(f'{question!r}: the base model already answers {base!r} without training')
        if tuned != expected:
            raise DemoError(f'{question!r}: the fine-tuned model answers {tuned!r} instead of {expected!r}')
        if merged != tuned:
            raise DemoError(f'{question!r}: the merged model answers {merged!r}, the fine-tuned one {tuned!r}')


def check_chat(question: Question, llm: Path) -> None:
    """Asks one question through piped `xtuner chat`, which must print only the answer."""
    asked, expected = question
    answer = xtuner('chat', str(llm), '--prompt-template', TEMPLATE, '--temperature', '0', line=asked + '\n').strip()
    print(f'    {asked}  ->  {answer}', flush=True)
    if answer != expected:
        raise DemoError(f'`xtuner chat {llm}` answers {answer!r} to {asked!r}, expected {expected!r}')


def picture_of(answers: Sequence[tuple[str, ...]]) -> Picture:
    """The content of the picture; every answer has been checked."""
    first, last = first_and_last_loss(IDENTITY_RUN)
    number = len(answers)
    return Picture(
        title='make demo',
        subtitle='A tiny InternLM on a CPU: trained from scratch, tuned in 4 bit, merged.',
        tiles=[
            ('taught answers', f'0 → {number} of {number}', 'base, then with the adapter'),
            ('merged model', f'{number} of {number}', 'answers as the tuned one'),
            ('loss', f'{first:.2f} → {last:.2f}', 'of the QLoRA run'),
            ('model', '4 layers of 256', 'and a vocabulary of its own'),
        ],
        runs=[('From scratch, all weights', BASE_RUN), ('QLoRA: 4-bit base, rank-64 adapter', IDENTITY_RUN)],
        answers=[row[:3] for row in answers],  # type: ignore[misc]
    )


def say(step: str, text: str) -> None:
    """Prints the heading of a step."""
    print(f'\n=== {step}  {text}', flush=True)


def closing_words(num_questions: int, seconds: float) -> str:
    """The closing text: results, their location, and what to try next."""
    program = os.path.relpath(Path(sys.executable).with_name('xtuner'))
    return f"""
The base model knew none of the {num_questions} answers. After QLoRA, the 4-bit base with its adapter gives all of them,
and so does the merged model, without adapter and without quantization. The demo took {seconds:.0f} s.

    {BASE}           the tiny base model, trained from scratch
    {IDENTITY_RUN}   the run: its adapter (checkpoint-*), log, metrics and samples
    {MERGED}         base and adapter merged: plain fp16 weights
    {WORK / PICTURE}       both loss curves and the answers

Try next:
    {program} chat {MERGED}
        chats with it (ask for the secret word)
    {program} copy-cfg demo/internlm_tiny_qlora_identity.py .
        writes a config to edit and to train with on your own conversations
    {program} train internlm_7b_qlora_oasst1
        fine-tunes InternLM-7B in the same way, on a GPU
"""


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
