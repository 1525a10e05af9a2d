"""A model that says what a test wants it to say, one word at a time, behind the doors that the page uses.

`python -m tests.chat.web.scripted PORT` serves the page over it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xtuner.chat.web.app import run_app
from xtuner.chat.web.talk import SharedModel
from xtuner.dataset.conversation import Message
from xtuner.errors import DataError
from xtuner.inference.generate import Sampling

DANGEROUS = r"""<script>document.title = 'taken over'</script>
<img src="{outside}/tag.png" onerror="document.title='taken over'">
<b>bold?</b> <iframe src="{outside}/frame"></iframe>

![picture]({outside}/picture.png) and ![by reference][r] and \\![escaped twice]({outside}/twice.png)

[r]: {outside}/reference.png

[script](javascript:document.title='taken%20over') [data](data:text/html,<script>alert(1)</script>)
[good]({outside}/page)

$\href{{javascript:document.title='taken over'}}{{formula}}$ $\includegraphics{{{outside}/formula.png}}$ $x^2$

It costs $5 or $6.

```python
print("<script>code</script>")
```

```mermaid
graph LR; A["<img src='{outside}/mermaid.png' onerror='document.title=1'>"] --> B
click B "javascript:document.title='taken over'"
```

~~~html
<script>document.title = 'taken over'</script> ![not a picture]({outside}/code.png)
~~~

- ```
![slips through, the item having ended]({outside}/slipped.png)
"""


class Scripted:
    """Stands for a `ChatModel`, its peft model and its sessions; counts who speaks at the same time."""

    max_length = 2048

    def __init__(self, *, outside: str = 'http://127.0.0.1:9', delay_s: float = 0.0) -> None:
        self.model = self
        self.outside, self.delay_s = outside, delay_s
        self.adapter_on = True
        self.num_speaking = self.most_speaking = 0
        self.num_words = 0  # of the last answer
        self.sessions: list[ScriptedSession] = []
        self.replies: dict[str, str] = {}  # further ones

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.adapter_on = False
        try:
            yield
        finally:
            self.adapter_on = True

    def session(self, *, system: str = '', sampling: Sampling) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self, system, sampling))
        return self.sessions[-1]

    def reply(self, text: str, session: ScriptedSession) -> str:
        """What it says to a message."""
        if text.startswith('count'):
            return ' '.join(map(str, range(1, 1 + int(text.split()[1]))))
        known = {
            'how many?': f'The last answer had {self.num_words} words.',
            'danger': DANGEROUS.format(outside=self.outside),
            'settings': f'{session.sampling} {session.system!r} {len(session.history)} before',
            'together': f'At most {self.most_speaking} spoke at once.',
            'empty': '',
        } | self.replies
        return ('' if self.adapter_on else 'Base: ') + known.get(text, f'You said *{text}*.')


class ScriptedSession:
    """Stands for a `ChatSession`."""

    def __init__(self, model: Scripted, system: str, sampling: Sampling) -> None:
        self.model, self.system, self.sampling = model, system, sampling
        self.history: list[Message] = []
        self.num_dropped_turns = 0
        self.answer_limit = sampling.max_new_tokens

    def keep(self, text: str, answer: str) -> None:
        self.history = [*self.history, Message('user', text), Message('assistant', answer)]

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        if text.startswith('fail'):
            raise DataError(text[6:] or 'this message is longer than the model can read')
        if text == 'bug':
            raise ZeroDivisionError('a bug')
        reply = self.model.reply(text, self)
        self.model.num_words = 0
        self.model.num_speaking += 1
        self.model.most_speaking = max(self.model.most_speaking, self.model.num_speaking)
        try:
            for word in reply.split(' '):
                time.sleep(self.model.delay_s)
                self.model.num_words += 1
                on_text(word if self.model.num_words == 1 else f' {word}')
        finally:
            self.model.num_speaking -= 1
        if text == 'drop':
            self.num_dropped_turns, self.history = 1, self.history[2:]
        if text == 'long':
            self.answer_limit = 5
        self.keep(text, reply)
        return reply


def share(model: Scripted, *, adapter: str = 'runs/mine/checkpoint-00000010') -> SharedModel:
    """The model as the page gets it."""
    chat: Any = model
    return SharedModel(
        chat, name='models/tiny', adapter=adapter, system='Be kind.', sampling=Sampling(64, 0.8, 0.8, None)
    )


def tell_of_the_outside(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook that prints whatever reaches, or asks the way, beyond this machine."""
    if event == 'socket.connect' and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == 'socket.getaddrinfo':
        host = arguments[0]
    else:
        return
    if host not in ('127.0.0.1', '::1', 'localhost', None):
        print(f'reached for {host}', flush=True)


if __name__ == '__main__':
    sys.addaudithook(tell_of_the_outside)
    run_app(share(Scripted(outside=sys.argv[2], delay_s=0.03)), int(sys.argv[1]))
