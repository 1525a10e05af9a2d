r"""Prompt format of InternLM-Chat's first release (July 2023), which treats the last question differently.

The tokenizer adds one BOS, and the prompt adds another before each earlier turn; the current question has none of its
own unless it is the first:

    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:              no history
    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:Hello<eoa>\n <|User|>:And?<eoh>\n<|Bot|>:

Training conversations are rendered in the same way, so that the last answer follows the prompt used at inference.
"""

from __future__ import annotations

from xtuner.dataset.conversation import Conversation
from xtuner.dataset.templates.template import Piece, Template

_OPENING = 'bos_token ~ "<|User|>:"'
_ALONE = '(\'\' if loop.index0 == ns.last and ns.round > 1 else bos_token) ~ "<|User|>:"'
_LOOP = '{%- for message in messages -%}'
_FIND_LAST = (
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    '{%- endfor -%}'
)


class FirstReleaseTemplate(Template):
    """A template whose user turns begin with BOS, except for the last of several."""

    def render(self, conversation: Conversation, *, train_on: str = 'assistant', prompt: bool = False) -> list[Piece]:
        """As `Template.render`, without the BOS before the last of several questions."""
        pieces = super().render(conversation, train_on=train_on, prompt=prompt)
        if sum(message.role == 'user' for message in conversation.messages) > 1:
            last = max(i for i, piece in enumerate(pieces) if piece.control and piece.text == '{bos}')
            del pieces[last]
        return pieces

    def chat_template(self) -> str:
        """The same format as Jinja: a first loop finds the last question."""
        jinja = super().chat_template().replace(_OPENING, _ALONE)
        return jinja.replace(_LOOP, _FIND_LAST + _LOOP, 1)
