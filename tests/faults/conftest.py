"""What the fault tests train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def forty_conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations, two or so a pack: some twenty packs, so that a run of many steps has many epochs."""
    path = tmp_path_factory.mktemp('data') / 'conversations.jsonl'
    with path.open('w', encoding='utf-8') as file:
        for i in range(40):
            messages = [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': f'{i}, of course.'}]
            file.write(json.dumps({'messages': messages}) + '\n')
    return path
