"""InternLM's own format."""

from __future__ import annotations

from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.templates.builtin import get_template


def test_internlm_chat_is_what_internlm_saw(internlm_like):
    template = get_template('internlm_chat', internlm_like)
    ids = encode_prompt([{'role': 'user', 'content': 'Hi'}], internlm_like, template)
    eoh = internlm_like.convert_tokens_to_ids('<eoh>')
    raw = internlm_like.backend_tokenizer
    text = lambda string: raw.encode(string, add_special_tokens=False).ids  # noqa: E731
    assert ids == [internlm_like.bos_token_id, *text('<|User|>:Hi'), eoh, *text('\n<|Bot|>:')]
    assert template.stop_ids(internlm_like)[0] == internlm_like.convert_tokens_to_ids('<eoa>')
