"""A session whose model says what a script says."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece as spm

from xtuner.dataset.templates.builtin import get_template

if TYPE_CHECKING:  # unit tests share this file, and import no torch
    from xtuner.inference.generate import Sampling

SYMBOLS = ['<eoh>', '<eoa>', '<eot>', '<eoc>', '<eor>', '<eom>']


class Model:
    """Stands for a model: says one text after the other, piece by piece, and remembers its prompts.

    Attributes:
        script: What is still to be said; an exception is raised.
        prompts: The decoded prompts so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        import torch

        self.dtype, self.device = torch.float32, torch.device('cpu')
        self.tokenizer = tokenizer
        self.script: list[Any] = []
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []

    def generate(self, model: Any, prompt_ids: Any, *, stop_ids: Any, sampling: Any, streamer: Any) -> list[int]:
        """In place of `xtuner.inference.generate.generate`."""
        import torch

        self.prompts.append(self.tokenizer.decode(list(prompt_ids)))
        self.samplings.append(sampling)
        said = self.script.pop(0)
        pieces = said if isinstance(said, list) else [said]
        streamer.put(torch.tensor([list(prompt_ids)]))
        ids: list[int] = []
        for piece in pieces:
            if not isinstance(piece, str):
                raise piece
            for i in self.tokenizer(piece, add_special_tokens=False).input_ids:
                ids.append(i)
                streamer.put(torch.tensor([i]))
                if i in stop_ids:
                    break
        streamer.end()
        return ids


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small InternLM tokenizer that has the end tokens of InternLM's and MOSS's templates."""
    from xtuner.model.loading import load_tokenizer

    folder = tmp_path_factory.mktemp('chat-tokenizer')
    trained = BytesIO()
    texts = ['what is one and two?', 'Hello, how are you? I am well!', '<|User|>: <|Bot|>:', '你好 世界'] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, model_type='bpe', vocab_size=400, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=SYMBOLS, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / 'tokenizer.model').write_bytes(trained.getvalue())
    settings = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>', 'unk_token': '<unk>',
                'tokenizer_class': 'InternLMTokenizer'}  # fmt: skip
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return load_tokenizer(Path(folder))


@pytest.fixture
def scripted(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scripted.session(max_length=…)`, `scripted.model.script`; answers come from the script."""
    from xtuner.chat.session import ChatSession
    from xtuner.inference.generate import Sampling

    model = Model(tokenizer)
    monkeypatch.setattr('xtuner.chat.session.generate', model.generate)

    def session(*, template: str = 'internlm_chat', kind: Any = ChatSession, max_length: int = 200, **more: Any) -> Any:
        sampling = more.pop('sampling', Sampling(max_new_tokens=20))
        found = get_template(template, tokenizer)
        return kind(model, tokenizer, found, sampling=sampling, max_length=max_length, **more)

    return SimpleNamespace(model=model, session=session)
