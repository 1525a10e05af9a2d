"""The conversations of the page: one model that all tabs share, and what one tab has said and heard."""

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

BASE, ADAPTER = 'base', 'adapter'  # who answers: the weights alone, or with their adapter
_LOOK_S = 0.2  # how often a tab that waits for the model looks whether its user has lost patience


class SharedModel:
    """The weights, loaded once for all tabs, and the right to use them, which one tab has at a time.

    Args:
        chat: The loaded model.
        name: Of the model, as the user gave it.
        adapter: Of the adapter, as the user gave it; '' for none.
        system: System message that a conversation begins with.
        sampling: How answers are drawn until a tab chooses otherwise.
    """

    def __init__(self, chat: ChatModel, *, name: str, adapter: str, system: str, sampling: Sampling) -> None:
        self.chat, self.name, self.adapter, self.system, self.sampling = chat, name, adapter, system, sampling
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, voice: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Waits for the model and holds it, its adapter on or off as `voice` says; calls `on_wait` while waiting."""
        while not self._lock.acquire(timeout=_LOOK_S):
            on_wait()
        try:
            with self.chat.model.disable_adapter() if self.adapter and voice == BASE else nullcontext():
                yield
        finally:
            self._lock.release()


@dataclass
class Answer:
    """What one voice said.

    Attributes:
        text: As far as it came.
        stopped: Whether the user stopped it.
        error: Why it failed, or ''.
        num_dropped_turns: How many of the oldest turns were left out to make room for it.
        room: Tokens that it had room for, where a long message left fewer than were asked for; else None.
    """

    text: str = ''
    stopped: bool = False
    error: str = ''
    num_dropped_turns: int = 0
    room: int | None = None


@dataclass
class Turn:
    """A message and, by voice, the answers to it."""

    text: str
    answers: dict[str, Answer] = field(default_factory=dict)


class Talk:
    """One tab's conversation, with one voice or with two that each remember only their own answers.

    Attributes:
        turns: All of it, also what the model no longer sees.
        pending: A message that waits for its answer; '' for none.
        system: System message from the next answer on.
        sampling: How the next answer is drawn.
        compare: Whether the base answers beside its adapter.
    """

    def __init__(self, shared: SharedModel) -> None:
        self.turns: list[Turn] = []
        self.pending = ''
        self.system, self.sampling, self.compare = shared.system, shared.sampling, False
        self._shared = shared
        self._histories: dict[str, list[Message]] = {}

    @property
    def voices(self) -> tuple[str, ...]:
        """Who answers, from left to right."""
        if not self._shared.adapter:
            return (BASE,)
        return (BASE, ADAPTER) if self.compare else (ADAPTER,)

    def begin_turn(self) -> Turn:
        """Takes the pending message as the newest turn; who does not answer it forgets what came before."""
        self._histories = {voice: self._histories[voice] for voice in self.voices if voice in self._histories}
        self.turns.append(Turn(self.pending))
        self.pending = ''
        return self.turns[-1]

    def answer(self, turn: Turn, voice: str, *, on_text: Callable[[str], None], on_wait: Callable[[], None]) -> Answer:
        """Answers a turn in one voice.

        Args:
            turn: The newest turn.
            voice: One of `voices`.
            on_text: Called with the whole answer so far, as it grows. What it raises ends the answer, which is kept as
                far as it came.
            on_wait: Called now and then while another tab has the model; may raise too.
        """
        answer = turn.answers[voice] = Answer()
        session = self._session(voice)

        def grow(piece: str) -> None:
            """Adds a piece to the answer and shows the whole."""
            answer.text += piece
            on_text(answer.text)

        try:
            with self._shared.lent(voice, on_wait):
                answer.text = session.ask(turn.text, grow)
        except XTunerError as error:
            answer.error = _one_line(error)
        except Exception as error:
            logger.exception('the answer failed')
            answer.error = f'unexpected {type(error).__name__}: {_one_line(error)} (the terminal has the traceback)'
        except BaseException:  # on_text, or on_wait: the user has stopped it
            answer.stopped = True
            if answer.text:
                session.keep(turn.text, answer.text)
            raise
        finally:
            answer.num_dropped_turns = session.num_dropped_turns
            answer.room = session.room if session.room < self.sampling.max_new_tokens else None
            self._histories[voice] = session.history
        return answer

    def clear(self) -> None:
        """Forgets the conversation; settings stay."""
        self.turns, self._histories = [], {}

    def export(self, voice: str) -> str:
        """The conversation in the OpenAI form, as JSON: a record that `xtuner train --data` takes."""
        messages = [{'role': 'system', 'content': self.system}] if self.system else []
        for turn in self.turns:
            if (answer := turn.answers.get(voice)) and answer.text:
                messages += [{'role': 'user', 'content': turn.text}, {'role': 'assistant', 'content': answer.text}]
        return to_line({'messages': messages})

    def _session(self, voice: str) -> ChatSession:
        """What the voice remembers; the base, asked for the first time, remembers what its adapter was asked."""
        session = self._shared.chat.session(system=self.system, sampling=self.sampling)
        session.history = self._histories.get(voice, self._histories.get(ADAPTER, []))
        return session


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())
