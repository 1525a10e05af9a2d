"""The prompt of InternLM-Chat's first release (July 2023), whose last question stands apart.

The tokenizer puts one BOS in front, and the prompt spells another before each past turn; but the question that is
asked now has none of its own, unless it is the first:

    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:              no history
    <s> <s> <|User|>:Hi<eoh>\n<|Bot|>:Hello<eoa>\n <|User|>:And?<eoh>\n<|Bot|>:
"""

from __future__ import annotations

from xtuner.dataset.conversation import Conversation
from xtuner.dataset.prompt import Piece, Template

_OPENING = 'bos_token ~ "<|User|>:"'


class FirstReleaseTemplate(Template):
    """A template whose user turns begin with BOS, except for the question at the end of a longer prompt."""

    def render(self, conversation: Conversation, *, train_on: str = 'assistant', prompt: bool = False) -> list[Piece]:
        """As `Template.render`; in a prompt, the BOS before the last of several questions is left out."""
        pieces = super().render(conversation, train_on=train_on, prompt=prompt)
        if prompt and sum(message.role == 'user' for message in conversation.messages) > 1:
            last = max(i for i, piece in enumerate(pieces) if piece.control and piece.text == '{bos}')
            del pieces[last]
        return pieces

    def chat_template(self) -> str:
        """The same as Jinja."""
        alone = '(\'\' if add_generation_prompt and loop.last and not loop.first else bos_token) ~ "<|User|>:"'
        return super().chat_template().replace(_OPENING, alone)
