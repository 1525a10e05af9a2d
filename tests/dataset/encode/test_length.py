from __future__ import annotations

import numpy as np
import pytest

from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.dataset.encode.length import ON_LONG, fit_length, num_targets
from xtuner.errors import DataError

pytestmark = pytest.mark.unit

#                       bos  question  answer   end
IDS = np.array([1, 10, 11, 12, 20, 21, 2])
SAMPLE = Sample(IDS, np.where(np.isin(IDS, [20, 21, 2]), IDS, -100))


@pytest.mark.parametrize('on_long', ON_LONG)
@pytest.mark.parametrize('max_length', [7, 8])
def test_what_fits_is_not_touched(on_long, max_length):
    assert fit_length(SAMPLE, max_length, on_long=on_long) is SAMPLE


def test_error_names_origin_length_and_what_to_do():
    with pytest.raises(
        DataError, match=r'f\.jsonl:3: the conversation has 7 tokens, `dataset.max_length` is 6; raise it'
    ):
        fit_length(SAMPLE, 6, on_long='error', origin='f.jsonl:3')


def test_drop_drops():
    assert fit_length(SAMPLE, 6, on_long='drop') is None


def test_truncate_never_claims_an_end_that_was_cut():
    cut = fit_length(SAMPLE, 6, on_long='truncate')
    assert cut.input_ids.tolist() == [1, 10, 11, 12, 20, 21]
    assert cut.labels.tolist() == [-100] * 4 + [20, 21]
    assert num_targets(fit_length(SAMPLE, 4, on_long='truncate')) == 0


@pytest.mark.parametrize(('begin_id', 'expected'), [(1, [1, 12, 20, 21, 2]), (None, [11, 12, 20, 21, 2])])
def test_truncate_left_keeps_the_end_and_the_begin(begin_id, expected):
    cut = fit_length(SAMPLE, 5, on_long='truncate_left', begin_id=begin_id)
    assert cut.input_ids.tolist() == expected
    assert cut.labels.tolist() == [-100, -100, 20, 21, 2]


def test_the_first_label_is_never_trained_even_where_only_the_answer_is_left():
    cut = fit_length(SAMPLE, 2, on_long='truncate_left', begin_id=1)
    assert cut.input_ids.tolist() == [1, 2] and cut.labels.tolist() == [-100, 2]
