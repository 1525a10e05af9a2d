"""State of the web page: the model that all tabs share, and the conversation of one tab."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from xtuner.chat.load import ChatModel
from xtuner.chat.session import ChatSession
from xtuner.dataset.conversation import Message
from xtuner.errors import XTunerError
from xtuner.inference.generate import Sampling
from xtuner.utils.jsonl import to_line

logger = logging.getLogger('xtuner')

BASE, ADAPTER = 'base', 'adapter'  # the answering model: the base weights alone, or with their adapter
_POLL_S = 0.2  # interval at which a tab that waits for the model checks for user actions


class SharedModel:
    """The model, loaded once for all tabs, with a lock that one tab holds at a time.

    Args:
        chat: The loaded model.
        name: Name of the model, as on the command line.
        adapter: Path of the adapter, as on the command line; '' for none.
        system: Initial system message of a conversation.
        sampling: Initial sampling settings.
    """

    def __init__(self, chat: ChatModel, *, name: str, adapter: str, system: str, sampling: Sampling) -> None:
        self.chat, self.name, self.adapter, self.system, self.sampling = chat, name, adapter, system, sampling
        self._lock = threading.Lock()

    @contextmanager
    def acquire(self, voice: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Acquires the model, with its adapter enabled or disabled for `voice`; calls `on_wait` while waiting."""
        while not self._lock.acquire(timeout=_POLL_S):
            on_wait()
        try:
            with self.chat.model.disable_adapter() if self.adapter and voice == BASE else nullcontext():
                yield
        finally:
            self._lock.release()


@dataclass
class Answer:
    """An answer of one model.

    Attributes:
        text: The text generated so far.
        stopped: Whether the user stopped it.
        error: The reason if it failed, or ''.
        num_dropped_turns: Number of oldest turns dropped to fit the context length.
        limit: Maximum tokens of the answer if a long prompt left fewer than requested; otherwise None.
    """

    text: str = ''
    stopped: bool = False
    error: str = ''
    num_dropped_turns: int = 0
    limit: int | None = None


@dataclass
class Turn:
    """A message and the answers to it, by model."""

    text: str
    answers: dict[str, Answer] = field(default_factory=dict)


class Talk:
    """The conversation of one tab, with one model (voice) or two with separate histories.

    Attributes:
        turns: All turns, including those dropped from the prompt.
        pending: The message to answer next; '' for none.
        system: System message of the next answer.
        sampling: Sampling settings of the next answer.
        compare: Whether the base model answers side by side with the adapter.
    """

    def __init__(self, shared: SharedModel) -> None:
        self.turns: list[Turn] = []
        self.pending = ''
        self.system, self.sampling, self.compare = shared.system, shared.sampling, False
        self._shared = shared
        self._histories: dict[str, list[Message]] = {}

    @property
    def voices(self) -> tuple[str, ...]:
        """The answering models, from left to right."""
        if not self._shared.adapter:
            return (BASE,)
        return (BASE, ADAPTER) if self.compare else (ADAPTER,)

    def begin_turn(self) -> Turn:
        """Makes the pending message the newest turn; models that do not answer it lose their history."""
        self._histories = {voice: self._histories[voice] for voice in self.voices if voice in self._histories}
        self.turns.append(Turn(self.pending))
        self.pending = ''
        return self.turns[-1]

    def answer(self, turn: Turn, voice: str, *, on_text: Callable[[str], None], on_wait: Callable[[], None]) -> Answer:
        """Answers a turn with one model.

        Args:
            turn: The newest turn.
            voice: One of `voices`.
            on_text: Called repeatedly with the text generated so far. An exception that it raises stops the answer,
                and the partial answer is kept.
            on_wait: Called repeatedly while another tab uses the model; may raise as well.
        """
        answer = turn.answers[voice] = Answer()
        session = self._session(voice)

        def grow(piece: str) -> None:
            """Appends a piece to the answer and shows it."""
            answer.text += piece
            on_text(answer.text)

        try:
            with self._shared.acquire(voice, on_wait):
                answer.text = session.ask(turn.text, grow)
        except XTunerError as error:
            answer.error = _one_line(error)
        except Exception as error:
            logger.exception('generating the answer failed')
            answer.error = f'unexpected {type(error).__name__}: {_one_line(error)} (the terminal has the traceback)'
        except BaseException:  # raised by on_text or on_wait: the user stopped the answer
            answer.stopped = True
            if answer.text:
                session.keep(turn.text, answer.text)
            raise
        finally:
            answer.num_dropped_turns = session.num_dropped_turns
            limit = session.answer_limit
            answer.limit = limit if limit < self.sampling.max_new_tokens else None
            self._histories[voice] = session.history
        return answer

    def clear(self) -> None:
        """Clears the conversation; settings stay."""
        self.turns, self._histories = [], {}

    def export(self, voice: str) -> str:
        """The conversation in OpenAI's format, as one line of JSON for `xtuner train --data`."""
        messages = [{'role': 'system', 'content': self.system}] if self.system else []
        for turn in self.turns:
            if (answer := turn.answers.get(voice)) and answer.text:
                messages += [{'role': 'user', 'content': turn.text}, {'role': 'assistant', 'content': answer.text}]
        return to_line({'messages': messages})

    def _session(self, voice: str) -> ChatSession:
        """A session with the history of the voice; a base that is new starts with the history of its adapter."""
        session = self._shared.chat.session(system=self.system, sampling=self.sampling)
        session.history = self._histories.get(voice, self._histories.get(ADAPTER, []))
        return session


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())
