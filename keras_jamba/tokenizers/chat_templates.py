"""Chat templates: conversations as the text that a model was trained on, rendered as transformers renders them."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from datetime import datetime

import numpy as np

# Names under which a message may hold its reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Stands at the end of the message that the model goes on with, until the text is cut there.
_END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "


def render(template, messages, variables, continue_final_message=False):
    """The text of one conversation.

    Args:
        template: text of a Jinja template.
        messages: a list of messages, dicts with a role.
        variables: what else the template sees: tools, documents, add_generation_prompt, special tokens.
        continue_final_message: whether the text ends with the content of the last message; or the name of the field
            of this message with which it ends.

    Raises:
        ValueError: if the template is no template, or fails with this conversation.
    """
    messages = [_with_reasoning(message) for message in _plain(_checked(messages))]
    tagged = _tag(messages, template, continue_final_message) if continue_final_message else None
    compiled = _compiled(template)
    try:
        text = compiled.render(messages=messages, **{name: _plain(x) for name, x in variables.items()})
    except Exception as error:  # a template is a program of the checkpoint's author: it may fail in any way
        raise ValueError(
            f"The chat template cannot render this conversation. Received: {error}. Change the messages, or what "
            "else was passed to apply_chat_template."
        ) from error
    return text if tagged is None else _cut(text, tagged)


def _checked(messages):
    """Messages as dicts without what is None; templates expect a missing key there."""
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
    """Dataclasses and Pydantic models, at any depth, as dicts."""
    if isinstance(x, Mapping):
        return {key: _as_dict(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_as_dict, x)) if type(x) in (list, tuple) else list(map(_as_dict, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: _as_dict(getattr(x, field.name)) for field in dataclasses.fields(x)}
    return _as_dict(x.model_dump()) if callable(getattr(x, "model_dump", None)) else x


def _plain(x):
    """Only JSON's own types, so that a template cannot call methods of anything else; other objects by their type."""
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


def _tag(messages, template, field):
    """Marks the end of the last message; returns its text."""
    field = field if isinstance(field, str) else "content"
    last, final = messages[-1], messages[-1].get(field)
    fields = [name for name in _REASONING if last.get(name) == final] if field in _REASONING else [field]
    if isinstance(final, (list, tuple)):
        block = next((block for block in reversed(final) if "text" in block), None)
        final = None if block is None else block["text"]
        if block is not None:
            block["text"] += _END_OF_MESSAGE
    elif isinstance(final, str):
        last.update({name: final + _END_OF_MESSAGE for name in fields})
    if not isinstance(final, str) or not any(name in template for name in fields):
        raise ValueError(
            f"continue_final_message takes a last message with text in {field!r}, which the template reads. Received: "
            f"{str(messages[-1])[:60]!r}. Pass add_generation_prompt=True instead, for a new message."
        )
    return final


def _cut(text, final):
    """The text up to the end of the last message."""
    tag = _END_OF_MESSAGE.strip()
    if final.strip() not in text or tag not in text:
        raise ValueError(
            "continue_final_message takes a template that renders the whole last message. Received: one that does "
            f"not render {final.strip()[:60]!r}. Pass add_generation_prompt=True instead, for a new message."
        )
    place = text.rindex(tag)
    kept = text[place : place + len(_END_OF_MESSAGE)] == _END_OF_MESSAGE
    # Where the template trims a message, it trims what the message ends with too.
    return text[:place] if kept else text[:place].rstrip()


@functools.lru_cache
def _compiled(text):
    """A compiled template."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "Chat templates need the library jinja2. Received: a Python without it. "
            'Install it: pip install "keras-jamba[text]".'
        ) from error
    try:
        return _environment(jinja2).from_string(text)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"A chat template must be a Jinja template. Received: {error}, in {text[:60]!r}. Set the tokenizer's "
            "chat_template to one."
        ) from error


def _environment(jinja2):
    """Where templates are run: a sandbox, for they come from whoever made the checkpoint."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` around what the assistant says: rendered as it stands."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

    class Dict:
        """`dict` without the attributes of a type."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that begin with an underscore, which could reach Python's own."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check_attribute(jinja2, name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            _check_attribute(jinja2, name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def _check_attribute(jinja2, name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace, which begins with an underscore")
