"""Answers fixed prompts before, during and after training, for a person to read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from xtuner.dataset.conversation import Message
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.templates.builtin import Template
from xtuner.errors import Interrupted, TrainingError, one_line
from xtuner.inference.decode.decoder import release
from xtuner.inference.detokenizer import strip_partial_character
from xtuner.inference.generate import Sampling, generate
from xtuner.tracking.files import SAMPLES_FILE
from xtuner.utils.escape import printable
from xtuner.utils.jsonl import append_line, truncate_after
from xtuner.utils.progress import Progress

logger = logging.getLogger('xtuner')

_MOST_SHOWN = 300  # characters of a prompt or an answer on the terminal


class EvaluateChatHook(Hook):
    """Prints greedy answers and appends them to `work_dir/samples.jsonl`.

    It never changes the run: the loop seeds every step anew, the model's mode is put back, and an error in generating
    is reported and left behind; but one of a single rank where all compute the answer ends the run.

    Args:
        tokenizer: The model's tokenizer.
        prompt_template: The template that training uses.
        evaluation_inputs: The prompts, each a user's text, or messages up to a user's.
        system: System message of each prompt that has none of its own; '' for none.
        every_n_iters: Optimizer steps between two rounds.
        max_new_tokens: Tokens an answer may have.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_template: Template,
        evaluation_inputs: Sequence[str | Sequence[Message]],
        *,
        system: str = '',
        every_n_iters: int,
        max_new_tokens: int = 100,
    ) -> None:
        self._tokenizer, self._template, self._interval = tokenizer, prompt_template, every_n_iters
        self._prompts = [_messages(prompt, system) for prompt in evaluation_inputs]
        self._sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)
        self._prints = True

    def before_train(self, runner: Any) -> None:
        """The first round; a resumed run has had it, and drops the answers of the steps that it will do again."""
        if runner.rank == 0 and self._prompts:
            last = runner.iter - (runner.iter == runner.max_iters)  # the last round comes after the last checkpoint
            truncate_after(Path(runner.work_dir) / SAMPLES_FILE, last if runner.iter else -1)
        if runner.iter == 0:
            self._round(runner, 0)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """A round each `every_n_iters` steps; the last step's belongs to `after_train`."""
        step = runner.iter + 1
        if step % self._interval == 0 and step < runner.max_iters:
            self._round(runner, step)

    def after_train(self, runner: Any) -> None:
        """The last round."""
        self._round(runner, runner.iter)

    def _round(self, runner: Any, step: int) -> None:
        # Where each rank holds a part of the weights, all compute the answers and the first one prints them.
        self._prints = runner.rank == 0
        if not self._prompts or not (self._prints or runner.strategy.together):
            return
        model = runner.bare_model
        training = model.training
        model.eval()
        try:
            with runner.strategy.whole():
                for number, messages in enumerate(Progress(self._prompts, 'sampling answers', unit='answers'), 1):
                    self._sample(runner, messages, number, step)
        except (Interrupted, TrainingError):
            raise
        except Exception as error:  # out of memory, an odd generation config, a full disk: not worth a run
            logger.warning('no sample at step %d, training goes on: %s', step, _words(error))
        finally:
            release(model.llm)
            model.train(training)

    def _sample(self, runner: Any, messages: Sequence[Message], number: int, step: int) -> None:
        """Generates one answer, by all ranks where they hold the weights together, and prints it on the first.

        Raises:
            TrainingError: the ranks do not agree on how it ended, so that they could not go on together.
        """
        together = runner.strategy.together and runner.watch is not None
        failure: Exception | None = None
        answer: list[int] = []
        try:
            answer = self._generate(runner.bare_model.llm, messages, synced=together)
        except Interrupted:
            raise
        except Exception as error:
            failure = error
        if together:
            runner.watch.agree_on_success(f'the sample at step {step}', '' if failure is None else _words(failure))
        if failure is not None:
            raise failure
        if self._prints:  # on one rank alone, so what fails here must not end the round that all ranks are in
            try:
                self._print(runner, messages[-1].content, answer, number, step)
            except Interrupted:
                raise
            except Exception as error:
                logger.warning('the sample at step %d is not recorded, training goes on: %s', step, _words(error))

    def _generate(self, llm: Any, messages: Sequence[Message], *, synced: bool) -> list[int]:
        ids = encode_prompt(messages, self._tokenizer, self._template)
        stop_ids = self._template.stop_ids(self._tokenizer)
        with torch.autocast(llm.device.type, llm.dtype, enabled=llm.dtype != torch.float32):
            return generate(llm, ids, stop_ids=stop_ids, sampling=self._sampling, synced=synced)

    def _print(self, runner: Any, prompt: str, answer_ids: list[int], number: int, step: int) -> None:
        stop_ids = self._template.stop_ids(self._tokenizer)
        written = [i for i in answer_ids if i not in stop_ids]
        answer = strip_partial_character(self._tokenizer.decode(written, clean_up_tokenization_spaces=False))
        logger.info('sample at step %d\n  > %s\n  %s', step, _shortened(prompt), _shortened(answer))
        record = {
            'step': step,
            'prompt': prompt,
            'answer': answer,
            'finished': bool(answer_ids) and answer_ids[-1] in stop_ids,
        }
        append_line(Path(runner.work_dir) / SAMPLES_FILE, record)
        runner.log_text(f'samples/{number}', f'{prompt}\n\n{answer}', step)


def _messages(prompt: str | Sequence[Message], system: str) -> list[Message]:
    messages = [Message('user', prompt)] if isinstance(prompt, str) else list(prompt)
    return [Message('system', system), *messages] if system and messages[0].role != 'system' else messages


def _shortened(text: str) -> str:
    """A text as a terminal may show it: one line of it, or a few; the file has all."""
    text = printable(text.strip())
    return text if len(text) <= _MOST_SHOWN else f'{text[:_MOST_SHOWN]} … ({len(text):,} characters)'


def _words(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'
