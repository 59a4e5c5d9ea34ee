"""Chat templates: rendering of conversations into a model's training format, as transformers renders them."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from datetime import datetime

import numpy as np

from keras_jamba.tokenizers import _template_budget as limits
from keras_jamba.tokenizers import _template_marks as marks

# Fields in which a message may hold its reasoning. Templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks the end of the message that the model continues. The rendered text is cut there.
_END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "
# Characters of a template. The longest templates of checkpoints have about 40,000.
_LONGEST = 65_536
# Characters of an error's reason, and of a date format.
_LONGEST_REASON = 300


def render(template, messages, variables, continue_final_message=False, name="chat_template"):
    """Returns the text of one conversation.

    Args:
        template: text of a Jinja template.
        messages: a list of messages, dicts with a role.
        variables: further variables of the template: tools, documents, add_generation_prompt, special tokens.
        continue_final_message: whether the text ends with the content of the last message. A string names the field
            of this message with which the text ends.
        name: the name of the template, for errors.

    Raises:
        ValueError: if the template is not a Jinja template, fails with this conversation, or takes too much time or
            memory. Also if a message or variable is nested too deeply.
        ImportError: if jinja2 is not installed.
    """
    with _refused_if_deep("messages"):
        messages = [_with_reasoning(message) for message in _plain(_checked(messages))]
        tagged = _mark_end(messages, template, continue_final_message) if continue_final_message else None
    text = marks.plain(_rendered(template, messages, variables, name)[0])
    return text if tagged is None else _cut(text, tagged)


def render_with_answers(template, messages, variables, name="chat_template"):
    """Returns the text of one conversation, and the places of the answers in it.

    Args:
        template, messages, variables, name: see `render`.

    Returns:
        `(text, [(begin, end), ...])`: what the tags `{% generation %}` enclose, in characters and in order.

    Raises:
        ValueError: see `render`. Also if the template has no such tag, or changes what a tag encloses.
        ImportError: if jinja2 is not installed.
    """
    if not _compiled(template, name).environment.has_generation:
        raise ValueError(
            "A mask of the assistant's tokens needs a chat template that marks the answers. Received: a template "
            f"without {{% generation %}}, in {name}. Write {{% generation %}} and {{% endgeneration %}} around what "
            "the assistant writes, in the template or in the argument chat_template."
        )
    with _refused_if_deep("messages"):
        messages = [_with_reasoning(message) for message in _plain(_checked(messages))]
    text, answers = _rendered(template, messages, variables, name)
    found = marks.places(text)
    if answers - {key for _, _, key in found}:
        raise ValueError(
            "A chat template must write its answers as they are, so that their places are known. Received: one that "
            f"changes or drops what {{% generation %}} encloses, in {name}. Use filters inside of the tag."
        )
    return marks.plain(text), [(begin, end) for begin, end, _ in found]


def _rendered(template, messages, variables, name):
    """Returns the text, and the set of the keys of its answers."""
    compiled = _compiled(template, name)
    with _refused_if_deep("variables of the template"):
        variables = {name: _plain(x) for name, x in variables.items()}
        given = limits.measured([messages, variables])[0]
    with limits.limited(given), marks.recorded() as answers:
        try:
            return compiled.render(variables | {"messages": messages}), answers
        except limits.LimitError as error:
            raise ValueError(_beyond_limits(error, name)) from None
        except Exception as error:  # a template is a program, which may raise any error
            raise ValueError(
                f"The chat template cannot render this conversation. Received: {_described(error)}, in {name}. Change "
                "the messages, or the other arguments of apply_chat_template."
            ) from error


@contextlib.contextmanager
def _refused_if_deep(name):
    """Raises a ValueError for values that are nested more deeply than functions can call themselves."""
    try:
        yield
    except RecursionError:
        raise ValueError(
            "A conversation must consist of values that are nested a few hundred times at most. Received: "
            f"{name} that are nested more deeply, or contain themselves. Flatten them, or write inner values as text."
        ) from None


def _checked(messages):
    """Returns messages as dicts without None values, because templates test for missing keys."""
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            "A conversation must be a list of messages, at least one. Received: "
            f"{type(messages).__name__} {str(messages)[:60]!r}. Pass [{{'role': 'user', 'content': 'Hello!'}}]."
        )
    found = [_as_dict(message) for message in messages]
    for message in found:
        if not isinstance(message, dict):
            raise ValueError(
                "A message must be a dict with a role. Received: "
                f"{type(message).__name__} {str(message)[:60]!r}. Pass {{'role': 'user', 'content': 'Hello!'}}."
            )
    return [{key: value for key, value in message.items() if value is not None} for message in found]


def _as_dict(x):
    """Returns dataclasses and Pydantic models at any depth as dicts."""
    if isinstance(x, Mapping):
        return {key: _as_dict(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_as_dict, x)) if type(x) in (list, tuple) else list(map(_as_dict, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: _as_dict(getattr(x, field.name)) for field in dataclasses.fields(x)}
    return _as_dict(x.model_dump()) if callable(getattr(x, "model_dump", None)) else x


def _plain(x):
    """Returns `x` with JSON types only, so that templates call no other methods. Other objects become type names."""
    if x is None or type(x) in (str, int, float, bool):
        return x
    for kind in (str, int, float):
        if isinstance(x, kind):
            return getattr(kind, {str: "__str__", int: "__int__", float: "__float__"}[kind])(x)
    x = _as_dict(x.item() if isinstance(x, np.generic) else x)
    if isinstance(x, dict):
        return {_plain(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return x if x is None or type(x) in (str, int, float, bool) else f"<{type(x).__name__}>"


def _with_reasoning(message):
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(messages, template, field):
    """Marks the end of the last message, and returns its text."""
    field = field if isinstance(field, str) else "content"
    last, final = messages[-1], messages[-1].get(field)
    fields = [name for name in _REASONING if last.get(name) == final] if field in _REASONING else [field]
    if isinstance(final, (list, tuple)):
        block = next((block for block in reversed(final) if isinstance(block, dict) and "text" in block), None)
        final = None if block is None else block["text"]
        if isinstance(final, str):
            block["text"] += _END_OF_MESSAGE
    elif isinstance(final, str):
        last.update({name: final + _END_OF_MESSAGE for name in fields})
    if not isinstance(final, str) or not any(name in template for name in fields):
        raise ValueError(
            f"continue_final_message needs a last message with text in {field!r}, which the template reads. Received: "
            f"{str(messages[-1])[:60]!r}. Pass add_generation_prompt=True instead, for a new message."
        )
    return final


def _cut(text, final):
    """Returns the text up to the end of the last message."""
    tag = _END_OF_MESSAGE.strip()
    if final.strip() not in text or tag not in text:
        raise ValueError(
            "continue_final_message needs a template that renders the complete last message. Received: one that does "
            f"not render {final.strip()[:60]!r}. Pass add_generation_prompt=True instead, for a new message."
        )
    place = text.rindex(tag)
    is_untrimmed = text[place : place + len(_END_OF_MESSAGE)] == _END_OF_MESSAGE
    # A template that trims a message also trims the end of its text.
    return text[:place] if is_untrimmed else text[:place].rstrip()


def _beyond_limits(error, name):
    return (
        f"A chat template must render a conversation in little time and memory. Received: {error}, in {name}. Use a "
        "template of a source that you trust, or pass fewer messages."
    )


def _described(error):
    """Returns the text of an error of Jinja or Python, in one line of bounded length."""
    return (str(error) or type(error).__name__)[:_LONGEST_REASON]


@functools.lru_cache
def _compiled(text, name):
    """Returns a compiled template."""
    if len(text) > _LONGEST:
        raise ValueError(
            f"A chat template must have at most {_LONGEST} characters. Received: {len(text)}, in {name}. Use a "
            "shorter template."
        )
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "Chat templates need the library jinja2. Received: a Python without it. "
            'Install it: pip install "keras-jamba[text]".'
        ) from error
    with limits.limited():
        try:
            return _environment(jinja2).from_string(text)
        except limits.LimitError as error:
            raise ValueError(_beyond_limits(error, name)) from None
        except Exception as error:  # also RecursionError, MemoryError and SyntaxError of the generated code
            raise ValueError(
                f"A chat template must be a Jinja template. Received: {_described(error)}, in {name} {text[:60]!r}. "
                "Correct the tokenizer's chat_template."
            ) from None


def _environment(jinja2):
    """Returns a sandboxed environment, because templates in checkpoints are untrusted."""
    import jinja2.ext

    from keras_jamba.tokenizers._template_calls import check_json, limited_filter
    from keras_jamba.tokenizers._template_limits import LimitedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}` around an assistant's answer, which is rendered unchanged and marked."""

        tags = {"generation"}

        def parse(self, parser):
            self.environment.has_generation = True
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return marks.marked(caller())

    class Dict:
        """`dict` without the attributes of a type."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that begin with an underscore, which could reach Python's internals."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check_attribute(jinja2, name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            _check_attribute(jinja2, name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        def __repr__(self):
            return "<Namespace>"  # Jinja writes all values, without bound.

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        check_json(x, indent, separators)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        if len(form) > _LONGEST_REASON or re.search(r"\d{3,}", form):
            raise jinja2.TemplateError(f"the date format {form[:60]!r}, which is too long or too wide")
        return datetime.now().strftime(form)

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.has_generation = False
    environment.filters["tojson"] = limited_filter("tojson", tojson)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def _check_attribute(jinja2, name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace, which begins with an underscore")
