"""InternLM3's tokenizer: encodes like InternLM's and decodes differently."""

from __future__ import annotations

from typing import Any

from xtuner.model.families.internlm.sentencepiece import SPACE
from xtuner.model.families.internlm.tokenization import InternLMTokenizer, clean_up

SPACES_KEY = 'spaces_for_interleaved_special_tokens'
"""In `tokenizer_config.json`, it distinguishes InternLM3's tokenizer from earlier ones."""


class InternLM3Tokenizer(InternLMTokenizer):
    """Loads InternLM3. Text is cleaned up only if the config or the caller requests it.

    Spaces around special tokens are added only with `spaces_for_interleaved_special_tokens`, and the first piece loses
    its space with `add_prefix_space`.
    """

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Same as InternLM's, with the two settings of the published config and their defaults."""
        kwargs = {SPACES_KEY: False, 'add_prefix_space': True, 'clean_up_tokenization_spaces': False} | kwargs
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decodes tokens as the original does."""
        return self._join(tokens)

    def _join(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        prefixed, spaced = self.init_kwargs.get('add_prefix_space', True), self.init_kwargs.get(SPACES_KEY, False)
        if prefixed and tokens and tokens[0].startswith(SPACE):
            tokens = [tokens[0][1:], *tokens[1:]]
        text, after_special = '', False
        group: list[str] = []
        for index, token in enumerate(tokens):
            if token in special:
                text += ' ' if spaced and index and not after_special else ''
                text += self._pieces_to_text(group) + token
                group = []
            else:
                text += ' ' if spaced and prefixed and after_special and index == 1 and token[:1] != SPACE else ''
                group += [token] if token else []  # empty if the first piece was only a space
            after_special = token in special
        return text + self._pieces_to_text(group)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        requested = clean_up_tokenization_spaces
        text = super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces=False, **kwargs)
        return clean_up(text) if (self.clean_up_tokenization_spaces if requested is None else requested) else text
