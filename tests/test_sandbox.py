"""Chat templates that would run for ever, fill the memory or crash."""

import time

import pytest

from mmdlm import sandbox
from mmdlm.chat import encode
from mmdlm.jinja import compiled, rendered
from mmdlm.messages import conversation

TALK = [{"role": "user", "content": "hi"}]
LOOP = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(100) %}{% set n.s = SET %}"
LOOP += "{% endfor %}{{ n.s | string | length }}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}a{% endfor %}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "macro": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(0) }}",
    "times": "{{ 'a' * 10**9 }}",
    "times a variable": "{% set n = 10**9 %}{{ n * [1] }}",
    "power": "{{ 7 ** 9999999 ** 2 }}",
    "squares": LOOP.replace("'aaaaaaaa'", "3").replace("SET", "n.s * n.s"),
    "plus": LOOP.replace("SET", "n.s + n.s"),
    "tilde": LOOP.replace("SET", "n.s ~ n.s"),
    "join": LOOP.replace("SET", "[n.s, n.s] | join"),
    "replace": LOOP.replace("SET", "n.s.replace('', n.s)"),
    "format": LOOP.replace("SET", "'{0}{0}'.format(n.s)"),
    "percent": LOOP.replace("SET", "'%s%s' % (n.s, n.s)"),
    "lists": LOOP.replace("SET", "[n.s, n.s]"),
    "tables": LOOP.replace("SET", "{'a': n.s, 'b': n.s}"),
    "tuples": LOOP.replace("SET", "(n.s, n.s)"),
    "blocks": "{% set a %}aaaa{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width of a field": "{{ '{:{}}'.format(1, 10**9) }}",
    "round": "{{ 5 | round(-10**9) }}",
    "indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "date": "{{ strftime_now('%999999999Y') }}",
    "sum": "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "maps": "{% set s = 'a' * 999999 %}{{ (['%s'] * 9999) | map('format', s) | join }}",
    "parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "zero": "{{ 1/0 }}",
    "kind": "{{ 'a' + 1 }}",
    "include": "{% include 'x' %}",
    "length": "a" * 10**6,
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_an_error_in_bounded_time(name: str) -> None:
    start = time.thread_time()
    with pytest.raises(ValueError, match="the chat template"):
        rendered(HOSTILE[name], TALK)
    assert time.thread_time() - start < 2


def test_time_is_bounded_where_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    slow = "{% set s = 'a' * 4000000 %}{% for i in range(9999) %}{% set t = s[::-1] %}{% endfor %}"
    with pytest.raises(ValueError, match=r"takes more than 0\.1 seconds"):
        rendered(slow, TALK)


def test_error_names_the_file_and_the_line(speller, tmp_path) -> None:
    tokenizer = speller(own="{{ 'a' }}\n{{ 1/0 }}").tokenizer
    tokenizer.save(tmp_path)
    loaded = type(tokenizer).from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: .* line 2 .*ZeroDivision"):
        encode(loaded, conversation(TALK), loaded.template, {})
    (tmp_path / "chat_template.jinja").write_text("{% for i in range(10**9) %}{% endfor %}")
    loaded = type(tokenizer).from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"chat_template.jinja: .*Range too big"):
        encode(loaded, conversation(TALK), loaded.template, {})


LEGAL = (
    "{{ ('ab' * 3) ~ ('c' | center(5)) ~ '%05d' % 7 ~ '{:>4}'.format(2) }}",
    "{{ {'b': [1, (2, 3)], 'a': {}} | tojson(indent=2) }}{{ [3, 1] | sort | join('-') }}",
    "{% for a, b in {'x': 1}.items() %}{{ loop.index }}{{ loop.last }}{{ a }}{{ b }}{% endfor %}",
    "{% for x in range(5) if x % 2 recursive %}{{ loop.length }}{{ x }}{% endfor %}",
    "{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}in{% endcall %}",
    "{{ messages | map(attribute='role') | list }}{{ [1, 2, 3] | sum }}{{ 2 ** 10 % 7 }}",
    "{{ 'Cutting Knowledge Date: 20231231 %s' % 'x' }}{{ 'a\nb' | indent(4) }}",
    "{% set ns = namespace(n=[]) %}{% set ns.n = ns.n + [1] %}{{ ns.n }}{{ 'x,y'.split(',')[-1] }}",
)


@pytest.mark.parametrize("template", LEGAL)
def test_legal_template_renders_as_in_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted, _ = render_jinja_template([TALK], chat_template=template, add_generation_prompt=True)
    assert rendered(template, TALK) == wanted[0]


def test_long_conversation_is_rendered() -> None:
    template = "{% for m in messages %}{{ m.role + m.content.replace('b', '') | trim }}{% endfor %}"
    talk = [{"role": "user", "content": "ab" * 2_000_000}] * 4
    assert len(rendered(template, talk)) == 4 * (4 + 2_000_000)


def test_filters_for_html_are_absent() -> None:
    for name in sandbox.ABSENT:
        with pytest.raises(ValueError, match=f"No filter named '{name}'"):
            compiled("{{ messages | " + name + " }}")
