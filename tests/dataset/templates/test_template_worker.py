"""The process that renders chat templates: its bounds, and its environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dataset.conftest import make_tokenizer
from tests.dataset.templates.test_rendering import (
    LOOP,
    PLAIN,
    assert_idle,
    compare,
    renderers,
    shown,
)
from xtuner.dataset.templates import worker_pool
from xtuner.dataset.templates.rendering import TemplateBoundError

# What a template may try, and the bound that it meets.
HOSTILE = {
    'loops': (LOOP, 'CPU time'),
    'a long text': ("{{ 'a' * 10**10 }}", 'memory'),
    'a long format': ("{{ '%1000000000d' % 1 }}", 'memory'),
    'a long new format': ("{{ '{:>10000000000}'.format(1) }}", 'memory'),
    'a long number': ("{{ 7**(10**8) }}", 'CPU time'),
    'center': ("{{ 'a'|center(10**10) }}", 'memory'),
    'indent': ("{{ ('a\n' * 10**6)|indent(10**6) }}", 'memory|CPU time'),
    'lipsum': ('{{ lipsum(n=10**9) }}', 'CPU time'),
    'doubling': ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
                 'memory|CPU time'),
    'recursion': ('{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}', 'recurses too deeply'),
    'join': ("{{ (['a' * 1000] * 10**7)|join }}", 'memory|CPU time'),
    'sort': ("{{ (('a ' * 10**7).split(' '))|sort|length }}", 'memory|CPU time'),
    'split': ("{% for i in range(99999) %}{% set x = ('ab' * 10**6).split('b') %}{% endfor %}", 'CPU time'),
    'replace': ("{{ ('a' * 10**5).replace('a', 'a' * 10**5) }}", 'memory'),
    'batch': ("{{ range(9)|batch(10**9, 'x')|list }}", 'memory'),
    'much text': ("{{ 'a' * 3000000 }}", 'wrote more than'),
    'nested at compile time': ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'recurses too deeply'),
    'long at compile time': ('{{ ' + '+'.join(['1'] * 100000) + ' }}', 'recurses too deeply|CPU time'),
    'an error of endless text': ('{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}'
                                 '{% endfor %}{{ raise_exception(n.a) }}', 'memory|CPU time'),
}  # fmt: skip


@pytest.mark.parametrize('case', HOSTILE)
def test_a_bound_ends_a_rendering_with_one_line_and_nothing_of_it_is_left(case, short):
    text, bound = HOSTILE[case]
    shown(PLAIN, 'Hi')
    error = shown(text, 'Hi')
    assert isinstance(error, TemplateBoundError), error
    assert '\n' not in str(error) and len(str(error)) < 300
    assert str(error).startswith('file:7: the chat template of /models/x ')
    assert any(part in str(error) for part in bound.split('|')), error
    assert_idle()
    assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>']


def test_the_process_has_no_files_and_no_environment_of_ours(monkeypatch):
    monkeypatch.setenv('CANARY', 'mine')
    file = (ROOT / 'README.md').open()
    worker_pool.POOL.close()
    shown(PLAIN, 'Hi')
    [pid] = renderers()
    assert b'CANARY' not in Path(f'/proc/{pid}/environ').read_bytes()
    assert sorted(os.listdir(f'/proc/{pid}/fd')) == ['0', '1', '2']
    limits = Path(f'/proc/{pid}/limits').read_text()
    assert [line.split()[-3] for line in limits.splitlines() if line.startswith('Max open files')] == ['3']
    assert b'libtorch' not in Path(f'/proc/{pid}/maps').read_bytes()
    file.close()


FEATURES = {
    'blocks': '  {% for m in messages %}\n  {%- if loop.first %}\n  {{ m.role }}\n  {% endif %}\n\n{% endfor %}\n x\n',
    'tojson': '{{ tools|tojson }}{{ messages|tojson(indent=2) }}{{ {"b": "é<>", "a": 1}|tojson(sort_keys=true) }}',
    'loopcontrols': '{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}'
                    '{% endfor %}',
    'generation': '{% for m in messages %}{% set x = 1 %}{% generation %}{{ m.content }}{% set x = 2 %}'
                  '{% endgeneration %}{{ x }}{% endfor %}',
    'time': "{{ strftime_now('%Y %B %d %A') }}",
    'namespace': '{% set n = namespace(self=1, x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}'
                 '{{ n.x }}{{ n.self }}',
    'underscore': '{% set n = namespace(_x=1) %}{{ n._x }}',
    'underscore later': '{% set n = namespace() %}{% set n._x = 1 %}{{ n }}',
    'dict': "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 1) }}{{ dict.mro }}",
    'variables': '{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ documents }}'
                 '{{ add_generation_prompt }}',
    'reasoning': '{% for m in messages %}{{ m }}{% endfor %}',
    'mutation': '{{ messages.append(1) }}',
    'undefined': '{{ nothing.here }}',
    'own error': '{{ raise_exception("no") }}',
    'literals': r'{{ "\N{BULLET}\x41é\n" }}{{ "é".encode("utf-16") }}{{ "é".encode("latin-1") }}',
    'filters': "{{ 'a b c'|wordwrap(2) }}{{ messages|pprint }}{{ '<a>&amp;'|striptags }}{{ '<'|e }}{{ 'x'|indent }}"
               "{{ 'see http://a.b'|urlize }}{{ {'a': '<'}|xmlattr }}{{ lipsum(n=0) }}{{ 12345|filesizeformat }}",
}  # fmt: skip


@pytest.mark.parametrize('name', FEATURES)
def test_the_environment_is_that_of_transformers(name):
    rendered = compare(make_tokenizer(['<|end|>']), FEATURES[name])
    assert rendered == (0 if name in ('underscore', 'underscore later', 'mutation', 'undefined', 'own error') else 16)
