"""A tiny model, two adapters on it, and a real server on loopback."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from xtuner.chat.hosts import LOOPBACK

if TYPE_CHECKING:  # unit tests share this file, and import no torch
    import torch

TEMPLATE = 'internlm_chat'


@pytest.fixture(scope='session')
def base(tiny_internlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternLM that draws neither <unk> nor <s>: random weights would, and those spoil the text before them."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp('served') / 'tiny'
    shutil.copytree(tiny_internlm, folder)
    weights = load_file(folder / 'model.safetensors')
    weights['lm_head.weight'][:2] = 0
    save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    return folder


@pytest.fixture(scope='session')
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that change what the base says: LoRA, and DoRA with a rank and targets of its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    from xtuner.model.loading import load_model

    found = {}
    kinds = {'first': {'r': 4, 'target_modules': ['q_proj', 'v_proj', 'down_proj']},
             'second': {'r': 2, 'use_dora': True, 'target_modules': ['k_proj', 'up_proj', 'o_proj']}}  # fmt: skip
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(lora_alpha=16, **kind))
        for key, parameter in model.named_parameters():
            if 'lora_' in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
        found[name] = tmp_path_factory.mktemp('adapters') / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope='session')
def loaded(base: Path, adapters: dict[str, Path]) -> Any:
    """The base and both adapters in memory."""
    from xtuner.serve.models import load_served

    words = [f'{name}={folder}' for name, folder in adapters.items()]
    return load_served(str(base), adapters=words, template=TEMPLATE)


@dataclass
class Running:
    """A server that answers."""

    url: str
    port: int
    service: Any
    base: str

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f'{self.url}/v1', **({'api_key': 'none', 'max_retries': 0} | options))

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Until no answer holds a row or waits for one."""
        until = time.monotonic() + seconds
        while self.service.scheduler.num_running or self.service.scheduler.num_waiting:
            assert time.monotonic() < until, 'rows are still held'
            time.sleep(0.01)


@contextmanager
def serving(
    loaded: Any, *, num_slots: int = 4, max_length: int = 512, header_s: float = 10, **options: Any
) -> Iterator[Running]:
    """Serves in a thread of this process; `options` are of Limits, Service or Guard."""
    import uvicorn

    from xtuner.inference.batching import BatchDecoder
    from xtuner.inference.generate import Sampling
    from xtuner.serve.app import Limits, Service
    from xtuner.serve.guard import Guard
    from xtuner.serve.server import listen, make_server

    limits = {k: options.pop(k) for k in ('body_bytes', 'body_s', 'waiting') if k in options}
    decoder = options.pop('decoder', None) or BatchDecoder(loaded.model, num_slots=num_slots, max_length=max_length)
    sampling = options.pop('sampling', Sampling(64, 0.0, 1.0, None))
    guard = Guard(**{'api_key': '', 'hosts': LOOPBACK} | options)
    service = Service(loaded, decoder, limits=Limits(max_length, **limits), sampling=sampling, guard=guard)
    taken = listen('127.0.0.1', 0)
    server: uvicorn.Server = make_server(service.app(), grace_s=5, header_s=header_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=taken)), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), 'the server ended'
        time.sleep(0.01)
    port = taken[0].getsockname()[1]
    try:
        yield Running(f'http://127.0.0.1:{port}', port, service, loaded.served[0].name)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), 'the server does not end'


@pytest.fixture(scope='module')
def server(loaded: Any) -> Iterator[Running]:
    with serving(loaded) as running:
        yield running


@pytest.fixture
def endless(loaded: Any) -> Any:
    """A decoder whose answers end at their greatest length only, each step of which takes 5 ms."""
    from xtuner.inference.batching import BatchDecoder

    class Endless(BatchDecoder):
        def prefill(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self._go_on(super().prefill(*args, **kwargs))

        def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            time.sleep(0.005)
            return self._go_on(super().step(*args, **kwargs))

        def _go_on(self, logits: torch.Tensor) -> torch.Tensor:
            logits = logits.clone()
            logits[:, list(loaded.served[0].stop_ids)] = float('-inf')
            return logits

    return Endless(loaded.model, num_slots=3, max_length=2048)
