from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xtuner.dataset.sources.readers as readers
from xtuner.dataset.sources.readers import READERS, read_file
from xtuner.errors import DataError

pytestmark = pytest.mark.unit

ROWS = [{'a': 'x', 'b': '1'}, {'a': 'é\n"', 'b': ' 2, 3'}, {'a': '', 'b': '你好'}]


def values(path):
    return [record.value for record in read_file(path) if not record.error]


def errors(path):
    return [(record.origin.removeprefix(str(path)), record.error) for record in read_file(path) if record.error]


def write(path, rows, form):
    if form == '.jsonl':
        path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    elif form == '.json':
        path.write_text(json.dumps(rows, indent=2), encoding='utf-8')
    elif form == '.parquet':
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open('w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter='\t' if form == '.tsv' else ',')
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize('form', sorted(READERS))
def test_every_form_gives_the_same_records(form, tmp_path):
    path = tmp_path / f'data{form}'
    write(path, ROWS, form)
    assert values(path) == ROWS


def test_lines_of_jsonl_are_counted_as_in_an_editor(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\n{"a": \n[1]')
    assert [record.origin for record in read_file(path)] == [f'{path}:{n}' for n in (1, 4, 5, 6)]
    assert values(path) == [{'a': 1}, {'a': 2}, [1]]
    assert errors(path) == [(':5', 'not JSON: Expecting value at column 8')]


def test_what_a_line_may_hold_that_is_wrong(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"a": "\xff"}\n{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\n' + b'[' * 100_000 + b'\n'
                     + b'9' * 5000 + b'\n{"a": "cut o')  # fmt: skip
    assert values(path) == [{'a': '\U0001f600'}]
    found = errors(path)
    assert found[0] == (':1', 'not UTF-8: byte 0xff at column 8')
    assert found[1] == (':2', 'contains a lone surrogate, which is not a character')
    assert [origin for origin, _ in found] == [':1', ':2', ':4', ':5', ':6']
    assert found[4][1].startswith('not JSON: Unterminated string')


def test_a_file_in_utf_16_is_said_to_be(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"a": "ü"}\n', encoding='utf-16')
    said = (':1', 'not UTF-8: byte 0xff at column 1; the file is UTF-16: save it as UTF-8')
    assert errors(path)[0] == said
    table = tmp_path / 'a.csv'
    table.write_text('a,b\n1,2\n', encoding='utf-16')
    assert errors(table) == [said] and values(table) == []


def test_a_line_that_is_too_long_is_skipped_and_what_follows_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'MAX_RECORD_BYTES', 1000)
    monkeypatch.setattr(readers, '_BLOCK', 64)
    path = tmp_path / 'a.jsonl'
    path.write_text(f'{{"a": 1}}\n{{"a": "{"x" * 5000}"}}\n{{"a": 2}}\n')
    assert values(path) == [{'a': 1}, {'a': 2}]
    assert [origin for origin, _ in errors(path)] == [':2']


@pytest.mark.parametrize('block', [1, 7, 64, 2**20])
def test_a_list_is_read_piece_by_piece(block, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, '_BLOCK', block)
    path = tmp_path / 'a.json'
    rows = [{'a': 'x' * n, 'b': [1.5, None, {'c': ']'}]} for n in range(40)] + [12, 345, 'text', None]
    path.write_text(json.dumps(rows, indent=1))
    assert values(path) == rows
    lines = path.read_text().splitlines()
    for record in list(read_file(path))[:40]:
        number = int(record.origin.rsplit(':', 1)[1])
        assert lines[number - 1] == ' {' and f'"{record.value["a"]}"' in lines[number]


def test_records_of_a_line_are_read_from_a_json_file_too(tmp_path):
    path = tmp_path / 'a.json'
    write(path, ROWS, '.jsonl')
    assert values(path) == ROWS


@pytest.mark.parametrize('text', ['{"data": [\n{"a": 1}]}', '{\n"a": 1\n}', '"text"', '{"a": {"b": 1},\n "c": 2}'])
def test_a_json_file_of_another_shape_is_one_bad_record(text, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(text)
    assert values(path) == []
    assert [error for _, error in errors(path)] and 'neither a list of records' in errors(path)[0][1]


def test_a_list_that_ends_in_the_middle_loses_only_its_end(tmp_path):
    path = tmp_path / 'a.json'
    whole = json.dumps(ROWS)
    for cut in range(1, len(whole)):
        path.write_text(whole[:cut])
        assert values(path) == ROWS[: len(values(path))]
        assert [error.split(' in the')[0] for _, error in errors(path)] == ['the file ends'], whole[:cut]


def test_a_list_broken_in_the_middle_is_an_error_that_says_why(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('[{"a": 1},\n {"a": oops},\n {"a": 3}]')
    with pytest.raises(DataError, match=r'a\.json:2: not JSON: Expecting value; the rest of the list'):
        list(read_file(path))


def test_a_row_of_csv_with_another_number_of_columns_is_bad(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_bytes(b'a,b\n1,2\n1\n"x\ny",4\n5,\xff\n\n7,8\n')
    assert values(path) == [{'a': '1', 'b': '2'}, {'a': 'x\ny', 'b': '4'}, {'a': '7', 'b': '8'}]
    assert errors(path) == [(':3', 'the row has 1 column, the header 2'), (':6', 'contains bytes that are not UTF-8')]


def test_a_broken_parquet_file_is_one_bad_record(tmp_path):
    path = tmp_path / 'a.parquet'
    path.write_bytes(b'PAR1 no')
    assert [error.startswith('not parquet') for _, error in errors(path)] == [True]


def test_a_file_of_no_known_kind_or_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"unknown file format '\.jsnl'; did you mean '\.jsonl'"):
        list(read_file(tmp_path / 'a.jsnl'))
    with pytest.raises(DataError, match=r'a\.jsonl cannot be read: No such file'):
        list(read_file(tmp_path / 'a.jsonl'))


@pytest.mark.parametrize('form', sorted(READERS))
@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_records_or_errors(form, tmp_path, content):
    path = tmp_path / f'a{form}'
    path.write_bytes(content)
    try:
        for record in read_file(path):
            assert record.origin.startswith(str(path))
            json.dumps(record.value, ensure_ascii=False, default=str).encode('utf-8')
    except DataError as error:
        assert str(error).startswith(str(path))


@pytest.mark.parametrize('form', ['.json', '.jsonl', '.csv', '.parquet'])
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_good_file_with_a_wrong_byte_gives_records_or_errors(form, tmp_path, data):
    path = tmp_path / f'a{form}'
    if not path.exists() or not (tmp_path / f'good{form}').exists():
        write(tmp_path / f'good{form}', ROWS, form)
    content = bytearray((tmp_path / f'good{form}').read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        assert all(record.origin for record in read_file(path))
    except DataError as error:
        assert str(error).startswith(str(path))


@pytest.mark.parametrize('form', ['.jsonl', '.csv'])
def test_a_line_of_fifty_megabytes_is_one_bad_record(form, tmp_path):
    path = tmp_path / f'a{form}'
    with path.open('w', encoding='utf-8') as file:
        file.write('{"a": 1}\n{"a": "' if form == '.jsonl' else 'a\n1\n"')
        for _ in range(50):
            file.write('x' * 10**6)
        file.write('"}\n{"a": 2}\n' if form == '.jsonl' else '"\n2\n')
    records = list(read_file(path))
    assert [bool(record.error) for record in records] == [False, True, False]
    assert records[1].origin == f'{path}:{2 if form == ".jsonl" else 3}'


@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize('start', ['', '\ufeff', '\n\n '])
def test_a_jsonl_file_that_holds_a_list_is_read_as_one(indent, start, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text(start + json.dumps(ROWS, indent=indent), encoding='utf-8')
    assert values(path) == ROWS


def test_lists_one_a_line_stay_records(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('[1]\n[2]\n')
    assert values(path) == [[1], [2]]


@pytest.mark.parametrize('rest', ['[{"a": 1}]', ' x', '\n\n{}'])
def test_what_follows_a_list_is_not_lost_in_silence(rest, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(ROWS) + rest)
    assert values(path) == ROWS
    assert [error for _, error in errors(path)] == ['unexpected content after the end of the list']


def test_the_first_record_of_a_json_file_may_be_as_long_as_any(tmp_path, monkeypatch):
    rows = [{'a': 'x' * 3_000_000}, {'a': 'y'}]
    for form, text in (('.json', '\n'.join(map(json.dumps, rows))), ('.jsonl', json.dumps(rows))):
        (tmp_path / f'a{form}').write_text(text)
        assert values(tmp_path / f'a{form}') == rows
    monkeypatch.setattr(readers, 'MAX_RECORD_BYTES', 2**20)
    assert values(tmp_path / 'a.json') == rows[1:]
    assert errors(tmp_path / 'a.json') == [(':1', 'longer than 1 MiB')]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('a,b\n1,2\n3,"open\n' + '5,6\n' * 100)
    with pytest.raises(DataError, match=r'a\.csv:3: a quote opened here is never closed'):
        list(read_file(path))
    path.write_text('a,b\n1,2\n3,"open\n5,6\n7,"b"\n9,10\n')
    assert errors(path) == [(':3', "not CSV: ',' expected after '\"' (lines 3 to 5)")]
    assert values(path) == [{'a': '1', 'b': '2'}, {'a': '9', 'b': '10'}]


@pytest.mark.parametrize('depth', [500, 990, 5000, 200_000])
def test_deep_nesting_is_a_bad_record(depth, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"a": ' + '[' * depth + ']' * depth + '}\n{"a": 1}')
    assert values(path)[-1] == {'a': 1} and len(list(read_file(path))) == 2
