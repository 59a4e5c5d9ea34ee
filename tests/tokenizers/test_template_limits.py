"""Time and memory of chat templates: hostile ones are refused, usual ones render as in transformers."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jinja2
import pytest
from checks import full, once
from hostile_templates import LARGE, LONG, SLOW
from usual_templates import USUAL

from keras_jamba.tokenizers import _template_budget, chat_templates

# Independent of the backend.
pytestmark = once
TALK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": [1, 2], "a": {"c": "é"}}}}]
TALKS = {
    "two messages": [{"role": "system", "content": " Be brief. "}, *TALK],
    "reasoning": [*TALK, {"role": "assistant", "content": "<think>\nso\n</think>\n\nHi!"}, *TALK],
    "tools": [
        *TALK,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "<b>\n c"},
    ],
    "long": [{"role": ("user", "assistant")[i % 2], "content": f"message {i} " + "wörd\n" * 400} for i in range(200)],
}


def render(template, messages=TALK, **variables):
    return chat_templates.render(template, messages, variables)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_with_large_values_is_refused_at_once(name):
    started = time.thread_time()
    with pytest.raises(ValueError, match="chat template .*Received: .*chat_template.*"):
        render(LARGE[name])
    assert time.thread_time() - started < 4


PRINTF = [name for name in LARGE if name.startswith("printf")]


@pytest.mark.parametrize("name", PRINTF)
def test_a_hostile_printf_format_is_refused_for_its_width(name):
    with pytest.raises(ValueError, match="Received: a template with a format that is too long, or too wide"):
        render(LARGE[name])


# Python refuses this format too. Its hazard is the time of a search for the width.
@pytest.mark.parametrize("name", sorted({*PRINTF} - {"printf with many parentheses"}))
def test_a_hostile_printf_format_is_one_that_python_accepts(name):
    template = jinja2.Environment().from_string(LARGE[name].replace("1000000000", "2000"))
    assert 2000 <= len(template.render()) < 2010


class Ones(dict):
    def __missing__(self, key):
        return 1


def test_no_printf_format_with_a_long_result_passes():
    generator, refused = random.Random(0), 0
    pieces = [*"%%%.0-#5sdxl()", "%%", "%(a)", "((b)c)", "4321", "٣", "s%(a)4321d"]
    for _ in range(30_000):
        form = "".join(generator.choices(pieces, k=generator.randint(2, 8)))
        for values in (Ones(), (1,), (1, 1)):
            # Wider texts take gigabytes.
            if re.search("[0-9]{6}", form):
                continue
            try:
                long = len(form % values) > len(form) + 1000 * form.count("%")
            except (TypeError, ValueError):
                continue
            if long:
                refused += 1
                with _template_budget.limited(), pytest.raises(_template_budget.LimitError):
                    _template_budget.check_printf(form, values)
    assert refused > 300


@pytest.mark.parametrize("form", ["%%1000000000d", "%%(%(a)s1000000000d", "%(1000000000)s", "%(a)999d", "%(a).3f1000"])
def test_digits_outside_a_width_and_short_widths_are_formatted(form):
    assert render(f"{{{{ '{form}' % {{'a': 1, '1000000000': 2}} }}}}") == form % Ones({"1000000000": 2})


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_template_is_refused_after_a_time_in_any_thread(name, monkeypatch):
    monkeypatch.setattr(_template_budget, "SECONDS", 0.1)
    found = []

    def run():
        started = time.thread_time()
        try:
            found.append(render(SLOW[name]))
        except ValueError as error:
            found.append((str(error), time.thread_time() - started))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (message, seconds), *_ = found
    assert "Received: a template that takes more than 0.1 seconds of CPU time, in chat_template" in message
    assert seconds < 1


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("talk", TALKS)
def test_usual_templates_render_as_in_transformers_and_cost_little(name, talk):
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = dict(bos_token="<s>", eos_token="</s>", tools=TOOLS if talk == "tools" else None, documents=None)
    expected, _ = render_jinja_template(
        [TALKS[talk]], chat_template=USUAL[name], add_generation_prompt=True, **variables
    )
    variables["add_generation_prompt"] = True
    assert render(USUAL[name], TALKS[talk], **variables) == expected[0]
    started = time.thread_time()
    render(USUAL[name], TALKS[talk], **variables)
    assert time.thread_time() - started < 2


def test_an_error_names_the_template_and_the_limit():
    template = "{{ 'x' * 3000000000 }}"
    with pytest.raises(ValueError, match=r"Received: .*more than 48 MiB, in chat_template\['rag'\]\. Use a template"):
        chat_templates.render(template, TALK, {}, name="chat_template['rag']")


def test_a_long_conversation_extends_the_memory():
    talk = [{"role": "user", "content": "x" * 4_000_000}]
    template = "{% for i in range(20) %}{{ messages[0].content }}{% endfor %}"
    assert len(render(template, talk)) == 80_000_000


def test_renderings_have_budgets_of_their_own():
    template = "{{ 'x' * 5000000 }}"
    for _ in range(3):
        assert len(render(template)) == 5_000_000


# Refused templates share a process. The compiler's memory is measured per template.
RUNS = [("LARGE", *LARGE), ("SLOW", *SLOW), *(("LONG", name) for name in LONG)]


@full()
@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run[:2]))
def test_a_hostile_template_takes_at_most_five_seconds_and_100_mb(run):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests / "helpers"), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, tests / "subprocess" / "hostile_template.py", *run],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found) == list(run[1:])
    for name, each in found.items():
        assert each["seconds"] < 5.5, (name, each)
        assert each["bytes"] < 110 * 2**20, (name, each)
        assert (each["error"] is None) == (run[0] == "LONG"), (name, each)
