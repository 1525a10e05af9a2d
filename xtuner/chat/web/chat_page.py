"""The page itself. Streamlit runs this file from top to bottom, in a thread of its own, at each thing a user does.

While an answer grows, whatever else a user does ends it at the next piece of text: Streamlit raises there. So
everything but Stop and Clear is disabled meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from xtuner.chat.web.app import shared_model
from xtuner.chat.web.prose import plain_markdown, safe_markdown
from xtuner.chat.web.talk import ADAPTER, BASE, Answer, SharedModel, Talk, Turn
from xtuner.inference.generate import Sampling
from xtuner.utils.escape import printable

ICON = Path(__file__).with_name('icon.svg')
LABELS = {BASE: ':material/foundation: Base', ADAPTER: ':material/tune: With the adapter'}
AVATARS = {'user': ':material/person:', 'assistant': ':material/neurology:'}


def main() -> None:
    """Draws the page, and answers where a message waits."""
    shared = shared_model()
    talk: Talk = st.session_state.setdefault('talk', Talk(shared))
    st.set_page_config(f'{printable(_short(shared.name))} · xtuner', str(ICON), 'wide' if talk.compare else 'centered')
    busy = bool(talk.pending)
    draw_sidebar(shared, talk, busy)
    if not talk.turns and not busy:
        draw_welcome(shared)
    for turn in talk.turns:
        draw_turn(talk, turn)
    st.chat_input('Message', key='message', disabled=busy, on_submit=_take_message, args=(talk,))
    if busy:
        answer_pending(talk)
        st.rerun()


def draw_sidebar(shared: SharedModel, talk: Talk, busy: bool) -> None:
    """Which model, how it answers, and what to do with the conversation."""
    st.logo(str(ICON), size='large')
    with st.sidebar:
        st.subheader(plain_markdown(_short(shared.name)), anchor=False)
        if shared.adapter:
            st.caption(f'with the adapter {plain_markdown(_short(shared.adapter))}')
            talk.compare = st.toggle(
                'Side by side', key='compare', disabled=busy, help='The base, without its adapter, answers too.'
            )
        talk.system = st.text_area(
            'System prompt', shared.system, key='system', disabled=busy, help='Holds from the next message on.'
        ).strip()
        talk.sampling = draw_sampling(shared, busy)
        clear, save = st.columns(2)
        clear.button('Clear', icon=':material/delete:', on_click=talk.clear, disabled=not talk.turns, width='stretch')
        save.download_button(
            'Save',
            talk.export(talk.voices[-1]),
            'conversation.jsonl',
            'application/jsonl',
            icon=':material/download:',
            on_click='ignore',
            disabled=busy or not talk.turns,
            help='The conversation in the OpenAI form, one line of JSON: `xtuner train --data` takes it.',
            width='stretch',
        )


def draw_sampling(shared: SharedModel, busy: bool) -> Sampling:
    """The sliders."""
    first = shared.sampling
    most = max(shared.chat.max_length // 2, first.max_new_tokens)
    length = st.slider('Longest answer, in tokens', 1, most, first.max_new_tokens, key='length', disabled=busy)
    temperature = st.slider(
        'Temperature',
        0.0,
        max(2.0, first.temperature),
        first.temperature,
        0.05,
        key='temperature',
        disabled=busy,
        help='0 takes the likeliest token each time.',
    )
    top_p = st.slider(
        'Top-p',
        0.01,
        1.0,
        first.top_p,
        0.01,
        key='top_p',
        disabled=busy or temperature == 0,
        help='Tokens are drawn from the likeliest that have this share of the probability.',
    )
    return Sampling(length, temperature, top_p, first.seed)


def draw_welcome(shared: SharedModel) -> None:
    """What an empty conversation shows."""
    st.title(plain_markdown(_short(shared.name)), anchor=False)
    st.markdown(':gray[Runs on this machine. Nothing you write leaves it.]')


def draw_turn(talk: Talk, turn: Turn) -> None:
    """A message and its answers."""
    with st.chat_message('user', avatar=AVATARS['user']):
        st.text(printable(turn.text))  # as it was typed
    if turn.answers:
        with st.chat_message('assistant', avatar=AVATARS['assistant']):
            for voice, column in _columns(tuple(turn.answers)).items():
                with column:
                    draw_answer(turn.answers[voice])


def draw_answer(answer: Answer) -> None:
    """One voice's answer, and what is to be said about it."""
    if answer.text:
        st.markdown(safe_markdown(answer.text))
    if answer.error:
        st.error(plain_markdown(answer.error), icon=':material/error:')
    elif answer.stopped:
        st.caption('Stopped.')
    elif not answer.text:
        st.caption('The model ended its answer without a word.')
    if answer.room is not None and not answer.error:
        st.caption(f'The message is long: this answer had room for {answer.room} tokens.')
    if answer.num_dropped_turns:
        turns = 'turn was' if answer.num_dropped_turns == 1 else f'{answer.num_dropped_turns} turns were'
        st.caption(f'To make room, the oldest {turns} left out of what the model reads.')


def answer_pending(talk: Talk) -> None:
    """Lets each voice answer, shown as it grows, with a button that stops it."""
    turn = talk.begin_turn()
    draw_turn(talk, turn)
    with st.chat_message('assistant', avatar=AVATARS['assistant']):
        places = {voice: column.empty() for voice, column in _columns(talk.voices).items()}
        st.button('Stop', icon=':material/stop_circle:', key='stop')  # a click is enough: it ends this run
        for voice, place in places.items():
            place.caption('…')
            talk.answer(turn, voice, on_text=_writer(place), on_wait=_waiter(place))


def _columns(voices: tuple[str, ...]) -> dict[str, Any]:
    """A place for each voice, side by side under their names where there are two."""
    if len(voices) == 1:
        return {voices[0]: st.container()}
    columns = dict(zip(voices, st.columns(len(voices)), strict=True))
    for voice, column in columns.items():
        column.caption(LABELS[voice])
    return columns


def _writer(place: Any) -> Callable[[str], None]:
    return lambda text: place.markdown(safe_markdown(text))


def _waiter(place: Any) -> Callable[[], None]:
    return lambda: place.caption('Waiting: the model is answering in another tab.')


def _take_message(talk: Talk) -> None:
    talk.pending = st.session_state.message


def _short(name: str) -> str:
    """The last part of a path or hub id; of a checkpoint's path, also its run."""
    parts = Path(name).parts
    return '/'.join(parts[-2:] if parts[-1].startswith('checkpoint-') else parts[-1:])


main()
