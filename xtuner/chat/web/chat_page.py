"""The script of the web page. Streamlit runs it from top to bottom, in a separate thread, at each user action.

Any action during an answer stops it at the next piece of text, because Streamlit raises an exception there. Therefore
all controls except Stop and Clear are disabled during an answer.
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
    """Draws the page and answers the pending message, if any."""
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
    """Draws the name of the model, the settings, and the buttons of the conversation."""
    st.logo(str(ICON), size='large')
    with st.sidebar:
        st.subheader(plain_markdown(_short(shared.name)), anchor=False)
        if shared.adapter:
            st.caption(f'with the adapter {plain_markdown(_short(shared.adapter))}')
            talk.compare = st.toggle(
                'Side by side',
                key='compare',
                disabled=busy,
                help='The base model answers too, with its adapter disabled.',
            )
        talk.system = st.text_area(
            'System prompt', shared.system, key='system', disabled=busy, help='Applies from the next message on.'
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
            help='Downloads the conversation in OpenAI format, one line of JSON, for `xtuner train --data`.',
            width='stretch',
        )


def draw_sampling(shared: SharedModel, busy: bool) -> Sampling:
    """Draws the sliders of the sampling settings."""
    default = shared.sampling
    maximum = max(shared.chat.max_length // 2, default.max_new_tokens)
    length = st.slider('Maximum tokens of an answer', 1, maximum, default.max_new_tokens, key='length', disabled=busy)
    temperature = st.slider(
        'Temperature',
        0.0,
        max(2.0, default.temperature),
        default.temperature,
        0.05,
        key='temperature',
        disabled=busy,
        help='0 is greedy decoding.',
    )
    top_p = st.slider(
        'Top-p',
        0.01,
        1.0,
        default.top_p,
        0.01,
        key='top_p',
        disabled=busy or temperature == 0,
        help='Nucleus sampling: samples from the smallest set of tokens with this probability.',
    )
    return Sampling(length, temperature, top_p, default.seed)


def draw_welcome(shared: SharedModel) -> None:
    """Draws the page of an empty conversation."""
    st.title(plain_markdown(_short(shared.name)), anchor=False)
    st.markdown(':gray[Runs on this machine. Your messages are not sent anywhere.]')


def draw_turn(talk: Talk, turn: Turn) -> None:
    """Draws a message and its answers."""
    with st.chat_message('user', avatar=AVATARS['user']):
        st.text(printable(turn.text))  # verbatim
    if turn.answers:
        with st.chat_message('assistant', avatar=AVATARS['assistant']):
            for voice, column in _columns(tuple(turn.answers)).items():
                with column:
                    draw_answer(turn.answers[voice])


def draw_answer(answer: Answer) -> None:
    """Draws one model's answer and the notes about it."""
    if answer.text:
        st.markdown(safe_markdown(answer.text))
    if answer.error:
        st.error(plain_markdown(answer.error), icon=':material/error:')
    elif answer.stopped:
        st.caption('Stopped.')
    elif not answer.text:
        st.caption('The model gave an empty answer.')
    if answer.limit is not None and not answer.error:
        st.caption(f'The prompt is long: this answer was limited to {answer.limit} tokens.')
    if answer.num_dropped_turns:
        turns = 'turn was' if answer.num_dropped_turns == 1 else f'{answer.num_dropped_turns} turns were'
        st.caption(f'To fit the context length, the oldest {turns} dropped from the prompt.')


def answer_pending(talk: Talk) -> None:
    """Streams the answer of each model, with a button that stops it."""
    turn = talk.begin_turn()
    draw_turn(talk, turn)
    with st.chat_message('assistant', avatar=AVATARS['assistant']):
        places = {voice: column.empty() for voice, column in _columns(talk.voices).items()}
        st.button('Stop', icon=':material/stop_circle:', key='stop')  # a click ends this run of the script
        for voice, place in places.items():
            place.caption('…')
            talk.answer(turn, voice, on_text=_writer(place), on_wait=_waiter(place))


def _columns(voices: tuple[str, ...]) -> dict[str, Any]:
    """A container for each model; two are side by side, with their names."""
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
    """The last component of a path or hub id, and also the run of a checkpoint."""
    parts = Path(name).parts
    return '/'.join(parts[-2:] if parts[-1].startswith('checkpoint-') else parts[-1:])


main()
