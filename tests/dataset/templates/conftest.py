"""What the tests of several templates' modules share."""

from __future__ import annotations

import pytest

from tests.dataset.conftest import all_markers, make_spaced_tokenizer, make_tokenizer
from xtuner.dataset.templates import rendering


@pytest.fixture(scope='module', params=['bytes', 'first', 'always', 'never', 'normalizer'])
def any_tokenizer(request):
    """Tokenizers that treat the beginning of a text in every way that is in use."""
    if request.param == 'bytes':
        return make_tokenizer(all_markers())
    return make_spaced_tokenizer(all_markers(), scheme=request.param)


@pytest.fixture
def short(monkeypatch):
    """A bound that tests can wait for."""
    monkeypatch.setattr(rendering, 'SECONDS', 0.5)
