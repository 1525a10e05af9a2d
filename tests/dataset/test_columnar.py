"""The same records give the same ids from every kind of file: what columnar files fill in is no data."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.conftest import make_tokenizer
from tests.dataset.map_fns.test_registration import RECORDS
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.encode.conversation_encoder import Encoder
from xtuner.dataset.map_fns import formats
from xtuner.dataset.prepare import encode_source
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import DataError

# Renders everything that it is given, as JSON, so that any difference of a message or a tool is one of the ids.
EVERYTHING = """{%- if tools %}{{ tools | tojson }}
{% endif %}{%- for m in messages %}<|im_start|>{{ m | tojson }}{# name tool_calls reasoning_content #}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"""

text = st.text('ab <>é\n"', min_size=1, max_size=6).filter(str.strip)
arguments = st.fixed_dictionaries(
    {}, optional={'city': text, 'days': st.integers(0, 9), 'near': st.lists(text, max_size=2)}
)
call = st.fixed_dictionaries(
    {'type': st.just('function'), 'function': st.fixed_dictionaries({'name': text}, optional={'arguments': arguments})},
    optional={'id': text},
)
flags = {'weight': st.sampled_from([0, 1]), 'loss': st.booleans()}
question = st.fixed_dictionaries({'role': st.just('user'), 'content': text}, optional={'name': text})
answer = st.fixed_dictionaries(
    {'role': st.just('assistant'), 'content': text},
    optional={
        **{key: flags[key] for key in ['loss']},
        'reasoning_content': text,
        'tool_calls': st.lists(call, max_size=2),
    },
)
tool = st.fixed_dictionaries(
    {'type': st.just('function')},
    optional={'name': text, 'parameters': st.fixed_dictionaries({}, optional={'required': st.lists(text, max_size=2)})},
)
record = st.fixed_dictionaries(
    {
        'messages': st.lists(st.tuples(question, answer), min_size=1, max_size=2).map(
            lambda turns: [m for t in turns for m in t]
        )
    },
    optional={'system': text, 'tools': st.lists(tool, max_size=2), 'score': st.integers(0, 3)},
)


@pytest.fixture(scope='module')
def own():
    tokenizer = make_tokenizer(['<|im_start|>', '<|im_end|>'])
    tokenizer.chat_template = EVERYTHING
    return tokenizer, get_template('from_tokenizer', tokenizer)


def ordered(value, like):
    """The value with its keys in a columnar file's order, which is one for all records."""
    if isinstance(value, dict):
        return {key: ordered(value[key], like[key]) for key in like if key in value}
    return [ordered(*pair) for pair in zip(value, like, strict=True)] if isinstance(value, list) else value


def write_all(records, folder):
    """Writes records as JSONL, a JSON list, parquet and a saved data set; yields what can be written."""
    import datasets
    import pyarrow.parquet

    columns = dict.fromkeys(key for record in records for key in record)
    filled = [{key: record.get(key) for key in columns} for record in records]  # both libraries look at the first alone
    rows = pyarrow.Table.from_pylist(filled).to_pylist()
    records = [ordered(record, row) for record, row in zip(records, rows, strict=True)]
    (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    (folder / 'a.json').write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), folder / 'a.parquet')
    datasets.Dataset.from_list(filled).save_to_disk(folder / 'saved')
    datasets.Dataset.from_list(filled).to_parquet(folder / 'b.parquet')
    return ['a.jsonl', 'a.json', 'a.parquet', 'saved', 'b.parquet']


def learnt(path, tokenizer, template, **options):
    config, summary = DatasetConfig(source=str(path), max_length=2**20, unique_id=None, **options), Summary()
    encoder = Encoder(tokenizer, template)
    [source] = open_sources(config.source)
    try:
        chunks = list(encode_source(source, config, encoder=encoder, summary=summary))
    except DataError as error:
        return str(error).partition(': ')[2]
    samples = [(sample.input_ids.tolist(), sample.labels.tolist()) for chunk in chunks for _, sample in chunk]
    return samples, summary.unused, summary.counts


def calling(**arguments):
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}
    return {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', 'tool_calls': [call]}]}


def test_missing_arguments_of_a_call_are_no_null(own, tmp_path):
    files = write_all([calling(city='x'), calling(days=1), {'messages': [{'role': 'user', 'content': 'q'},
                      {'role': 'assistant', 'content': 'a'}]}], tmp_path)  # fmt: skip
    found = [learnt(tmp_path / file, *own) for file in files]
    assert all(one == found[0] for one in found)
    text = own[0].decode(found[0][0][0][0])
    assert '"city": "x"' in text and 'null' not in text and 'days' not in text


@given(st.lists(record, min_size=1, max_size=4))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_padding_is_no_data(own, tmp_path_factory, records):
    folder = tmp_path_factory.mktemp('columnar')
    try:
        files = write_all(records, folder)
    except Exception as error:  # pyarrow has no form for a struct without fields
        assert 'struct' in str(error).lower() or 'empty' in str(error).lower()
        return
    found = [learnt(folder / file, *own) for file in files]
    assert all(one == found[0] for one in found), list(zip(files, found, strict=True))


OTHER = {
    'messages': [{'role': 'user', 'content': 'q', 'weight': 1, 'name': 'x'},
                 {'role': 'assistant', 'content': 'a', 'reasoning_content': 'r', 'loss': False}],
    'conversations': [{'from': 'human', 'value': 'q', 'weight': 0}, {'from': 'gpt', 'value': 'a', 'train': True}],
    'instruction': 'i', 'output': 'o', 'system': 's', 'history': [['q', 'a']], 'images': ['x'], 'id': 'x',
}  # fmt: skip


@pytest.mark.parametrize('name', sorted(set(formats()) - {'arxiv', 'colors'}))
def test_a_format_is_detected_and_read_beside_records_of_other_columns(name, tmp_path, internlm_like):
    """A columnar file has every column for every record, most of them empty."""
    template = get_template('moss_sft' if name == 'moss_003_sft' else 'internlm_chat')
    mine = {key: value for key, value in RECORDS[name].items() if key != 'tools'}
    other = {key: value for key, value in OTHER.items() if key not in mine or isinstance(mine[key], list)}
    files = write_all([mine, other], tmp_path)
    for options in ({'map_fn': name}, {}):
        found = [learnt(tmp_path / file, internlm_like, template, on_bad_record='skip', **options) for file in files]
        assert found[0][0]
        assert all(one == found[0] for one in found), list(zip(files, found, strict=True))
