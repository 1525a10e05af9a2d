"""What is answered: the real `openai` client against the server, beside the session that a terminal has."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serve.conftest import TEMPLATE, Running, serving
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.inference.detokenizer import strip_partial_character
from xtuner.inference.generate import Sampling, generate

PROMPTS = ['Hello', 'What is the capital of France?', 'Wer bist du?', '你好,请讲一个故事。', 'a', '1 + 1 = ?', 'Sing!']


def ask(client: OpenAI, model: str, text: str, **options: Any) -> Any:
    messages: Any = [{'role': 'user', 'content': text}]
    return client.chat.completions.create(model=model, messages=messages, **({'max_tokens': 24} | options))


def content(response: Any) -> str:
    return response.choices[0].message.content


@pytest.fixture(scope='module')
def client(server: Running) -> OpenAI:
    return server.client()


@pytest.fixture(scope='module')
def expected(base: Path, adapters: dict[str, Path]) -> dict[str, list[str]]:
    """What a chat session says to each prompt, for the base and for each adapter alone on it."""
    from xtuner.chat.load import open_session

    found = {}
    for name, folder in {base.name: None, **adapters}.items():
        session = open_session(str(base), adapter=folder, template=TEMPLATE, sampling=Sampling(24, 0))
        found[name] = []
        for prompt in PROMPTS:
            session.clear()
            found[name].append(session.ask(prompt, lambda _: None))
    assert len({tuple(answers) for answers in found.values()}) == 3, 'the adapters change nothing'
    return found


def test_greedy_answers_are_those_of_a_chat(client: OpenAI, expected: dict[str, list[str]]) -> None:
    for model, answers in expected.items():
        assert [content(ask(client, model, prompt)) for prompt in PROMPTS] == answers


def test_answers_drawn_together_are_those_drawn_alone(client: OpenAI, expected: dict[str, list[str]]) -> None:
    """All prompts at once to the base and both adapters: more than there are slots, of different lengths."""
    cases = [(model, number) for number in range(len(PROMPTS)) for model in expected]
    with ThreadPoolExecutor(len(cases)) as pool:
        got = list(pool.map(lambda case: content(ask(client, case[0], PROMPTS[case[1]])), cases))
    assert got == [expected[model][number] for model, number in cases]


def test_a_conversation_of_several_turns(client: OpenAI, base: Path, loaded: Any, server: Running) -> None:
    parts = [{'type': 'text', 'text': 'Hi'}]
    messages: Any = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': parts},
                     {'role': 'assistant', 'content': 'Hello!'}, {'role': 'user', 'content': 'And now?'}]  # fmt: skip
    response = client.chat.completions.create(model=server.base, messages=messages, max_completion_tokens=9)
    model = loaded.served[0]
    ids = encode_prompt([m | {'content': 'Hi'} if isinstance(m['content'], list) else m for m in messages],
                        model.tokenizer, model.template)  # fmt: skip
    assert response.usage.prompt_tokens == len(ids)
    loaded.use(None)
    drawn = generate(loaded.model, ids, stop_ids=sorted(model.stop_ids), sampling=Sampling(9, 0))
    assert response.usage.completion_tokens == len(drawn)
    whole = model.tokenizer.decode([i for i in drawn if i not in model.stop_ids])
    assert content(response) == strip_partial_character(whole)


@pytest.mark.parametrize('prompt', PROMPTS[:4])
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, server: Running, prompt: str) -> None:
    whole = ask(client, server.base, prompt)
    chunks = list(ask(client, server.base, prompt, stream=True, stream_options={'include_usage': True}))
    assert chunks[0].choices[0].delta.role == 'assistant'
    pieces = [chunk.choices[0].delta.content or '' for chunk in chunks[:-1]]
    assert ''.join(pieces) == content(whole)
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ['length']
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_completions_continue_a_document(client: OpenAI, server: Running, loaded: Any) -> None:
    """A text, several, and ids: the ids of a document in training without its end."""
    tokenizer = loaded.served[0].tokenizer
    ids = [tokenizer(text)['input_ids'] for text in ('Once', 'One two')]
    assert ids[0][0] == tokenizer.bos_token_id
    loaded.use(None)
    stop_ids = sorted(loaded.served[0].stop_ids)
    drawn = [generate(loaded.model, one, stop_ids=stop_ids, sampling=Sampling(8, 0)) for one in ids]
    want = [strip_partial_character(tokenizer.decode(one)) for one in drawn]
    both = client.completions.create(model=server.base, prompt=['Once', 'One two'], max_tokens=8)
    assert [choice.text for choice in both.choices] == want
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(model=server.base, prompt=ids[1], max_tokens=8).choices[0].text == want[1]
    stream = client.completions.create(model=server.base, prompt='Once', max_tokens=8, stream=True)
    assert ''.join(chunk.choices[0].text for chunk in stream) == want[0]


def test_stop_words_and_lengths(client: OpenAI, server: Running) -> None:
    whole = content(ask(client, server.base, 'Hello'))
    word = whole[7:10]
    cut = ask(client, server.base, 'Hello', stop=['never said', word])
    assert content(cut) == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == 'stop'
    streamed = ask(client, server.base, 'Hello', stop=word, stream=True)
    assert ''.join(c.choices[0].delta.content or '' for c in streamed) == content(cut)
    short = ask(client, server.base, 'Hello', max_tokens=1)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, 'length')
    assert whole.startswith(content(short))


def test_a_seed_makes_an_answer_repeatable_whoever_else_is_served(client: OpenAI, server: Running) -> None:
    def drawn(seed: int) -> str:
        return content(ask(client, server.base, 'Hello', temperature=1.5, seed=seed))

    alone = [drawn(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(drawn, range(6))) == alone


def test_a_prompt_longer_than_a_pass_is_prefilled_in_chunks(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While other requests are decoded in neighbouring slots; one of them is cancelled meanwhile."""
    monkeypatch.setattr('xtuner.inference.scheduler.PREFILL_TOKENS', 16)
    model = loaded.served[0]
    long = 'one two three four five six seven eight nine ten ' * 4
    with serving(loaded, num_slots=4) as running:
        client = running.client()
        assert len(encode_prompt([{'role': 'user', 'content': long}], model.tokenizer, model.template)) > 48
        names = [m.name for m in loaded.served]
        cases = [(name, text) for name in names for text in (long, 'Hi', long + 'eleven')]
        alone = [content(ask(client, *case, max_tokens=3 + 5 * n)) for n, case in enumerate(cases)]
        with ThreadPoolExecutor(len(cases)) as pool:
            together = pool.map(lambda n: content(ask(client, *cases[n], max_tokens=3 + 5 * n)), range(len(cases)))
            assert list(together) == alone
    monkeypatch.undo()
    with serving(loaded) as running:
        assert content(ask(running.client(), running.base, long, max_tokens=3)) == alone[0]


def test_models_and_health(client: OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == [server.base, 'first', 'second']
    assert client.models.retrieve('second').id == 'second'
    with urllib.request.urlopen(f'{server.url}/health') as response:
        assert json.load(response) == {'status': 'ok', 'running': 0, 'waiting': 0}


def test_a_disconnected_client_frees_its_slot(loaded: Any, endless: Any) -> None:
    """Streamed, not streamed, and still waiting; each answer would take 10 s."""
    with serving(loaded, decoder=endless, max_length=2048) as running:
        scheduler, client = running.service.scheduler, running.client()
        streams = [ask(client, running.base, 'Hello', max_tokens=2000, stream=True) for _ in range(3)]
        for stream in streams:
            assert [next(stream) for _ in range(2)][1].choices[0].delta.content
        assert scheduler.num_running == 3
        with pytest.raises(openai.APITimeoutError):
            ask(running.client(timeout=0.3), running.base, 'Hello', max_tokens=2000)
        for stream in streams[:2]:
            stream.close()
        with pytest.raises(openai.APITimeoutError):
            ask(running.client(timeout=0.3), running.base, 'Hello', max_tokens=2000)
        assert content(ask(client, running.base, 'Hello', max_tokens=5)), 'an answer beside the one that goes on'
        streams[2].close()
        running.wait_until_idle(2)
        assert len(running.service.post) == 0


def test_a_failing_model_ends_answers_and_not_the_service(loaded: Any) -> None:
    from xtuner.inference.batching import BatchDecoder

    class Failing(BatchDecoder):
        fail = False

        def step(self, *args: Any, **kwargs: Any) -> Any:
            if self.fail:
                raise RuntimeError('out of memory while reading SECRET')
            return super().step(*args, **kwargs)

    decoder = Failing(loaded.model, num_slots=2, max_length=512)
    with serving(loaded, decoder=decoder) as running:
        client = running.client()
        before = content(ask(client, running.base, 'Hello'))
        decoder.fail = True
        with pytest.raises(openai.InternalServerError) as failed:
            ask(client, running.base, 'Hello')
        assert 'SECRET' not in str(failed.value)
        with pytest.raises(openai.APIError, match='the model fails on every token'):
            list(ask(client, running.base, 'Hello', stream=True))
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f'{running.url}/health')
        assert health.value.code == 503
        decoder.fail = False
        assert content(ask(client, running.base, 'Hello')) == before
