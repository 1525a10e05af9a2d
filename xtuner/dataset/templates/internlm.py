r"""The prompt of InternLM-Chat's first release (July 2023), whose last question stands apart.

The tokenizer puts one BOS in front, and the prompt spells another before each past turn; but the question that is
asked now has none of its own, unless it is the first:

    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:              no history
    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:Hello<eoa>\n <|User|>:And?<eoh>\n<|Bot|>:

A conversation for training is rendered in the same way, so its last answer stands behind what the model will be asked.
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
        """As `Template.render`; the BOS before the last of several questions is left out."""
        pieces = super().render(conversation, train_on=train_on, prompt=prompt)
        if sum(message.role == 'user' for message in conversation.messages) > 1:
            last = max(i for i, piece in enumerate(pieces) if piece.control and piece.text == '{bos}')
            del pieces[last]
        return pieces

    def chat_template(self) -> str:
        """The same as Jinja: a first loop finds the last question."""
        jinja = super().chat_template().replace(_OPENING, _ALONE)
        return jinja.replace(_LOOP, _FIND_LAST + _LOOP, 1)
