"""InternLM2's tokenizer: InternLM's, with the names that its config assigns to reserved pieces."""

from __future__ import annotations

from xtuner.model.families.internlm.tokenization import InternLMTokenizer


class InternLM2Tokenizer(InternLMTokenizer):
    """Loads InternLM2 and 2.5: `<|im_start|>` and other control tokens replace `[UNUSED_TOKEN_…]` pieces."""
