"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # before any test imports a library that reads it

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Real tokenizer and conversations, beside the checkout; they are not part of the project."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'{folder} is absent: the real tokenizer and conversations lie there where they are available')
    return folder
