"""InternLM2's tokenizer: read as InternLM's is, with the names that its config gives to reserved pieces."""

from __future__ import annotations

from xtuner.model.families.internlm.tokenization import InternLMTokenizer


class InternLM2Tokenizer(InternLMTokenizer):
    """Loads InternLM2 and 2.5: `<|im_start|>` and its kin take the place of `[UNUSED_TOKEN_…]` pieces."""
