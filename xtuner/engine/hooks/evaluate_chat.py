"""Generates answers to fixed prompts before, during and after training."""

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

_MAX_SHOWN = 300  # characters of a prompt or an answer in the log


class EvaluateChatHook(Hook):
    """Logs greedy answers and appends them to `work_dir/samples.jsonl`.

    It never changes the run: every step is seeded anew, the model's mode is restored, and an error in generation is
    only logged, unless all ranks generate together and only one of them fails, which ends the run.

    Args:
        tokenizer: The model's tokenizer.
        prompt_template: The template that training uses.
        evaluation_inputs: The prompts, each a user's text, or messages up to a user message.
        system: System message for prompts that have none; '' for none.
        every_n_iters: Optimizer steps between two rounds.
        max_new_tokens: Maximum tokens of an answer.
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
        """First round; a resumed run skips it and drops the answers of steps that will be repeated."""
        if runner.rank == 0 and self._prompts:
            last = runner.iter - (runner.iter == runner.max_iters)  # the last round comes after the last checkpoint
            truncate_after(Path(runner.work_dir) / SAMPLES_FILE, last if runner.iter else -1)
        if runner.iter == 0:
            self._round(runner, 0)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """A round every `every_n_iters` steps, except for the last step, which `after_train` handles."""
        step = runner.iter + 1
        if step % self._interval == 0 and step < runner.max_iters:
            self._round(runner, step)

    def after_train(self, runner: Any) -> None:
        """The last round."""
        self._round(runner, runner.iter)

    def _round(self, runner: Any, step: int) -> None:
        # If weights are sharded, all ranks generate the answers and the first one logs them.
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
        except Exception as error:  # out of memory, a bad generation config, a full disk: must not end the run
            logger.warning('no sample at step %d, training continues: %s', step, _error_text(error))
        finally:
            release(model.llm)
            model.train(training)

    def _sample(self, runner: Any, messages: Sequence[Message], number: int, step: int) -> None:
        """Generates one answer, on all ranks if weights are sharded, and logs it on the first.

        Raises:
            TrainingError: Only some of the ranks failed, so they cannot continue together.
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
            runner.watch.agree_on_success(f'the sample at step {step}', '' if failure is None else _error_text(failure))
        if failure is not None:
            raise failure
        if self._prints:  # only one rank is here, so a failure must not end the round of all ranks
            try:
                self._print(runner, messages[-1].content, answer, number, step)
            except Interrupted:
                raise
            except Exception as error:
                logger.warning('sample at step %d was not recorded, training continues: %s', step, _error_text(error))

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
    """Shortens a text for the terminal; the file contains all of it."""
    text = printable(text.strip())
    return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]} … ({len(text):,} characters)'


def _error_text(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'
