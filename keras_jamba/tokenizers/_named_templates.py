"""Named chat templates of a tokenizer: the choice of one, and their files."""

import reprlib
from pathlib import Path, PurePath

TEMPLATE = "chat_template.jinja"
# The folder of named templates, one per file.
TEMPLATES = "additional_chat_templates"


def checked(templates):
    """Returns the chat template of a tokenizer. Raises ValueError unless it is a text, a dict of texts, or None."""
    texts = [*templates, *templates.values()] if isinstance(templates, dict) else [templates]
    if templates is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(
            "The chat_template of a tokenizer must be a text, a dict of named texts, or None. Received: "
            f"{reprlib.repr(templates)}. Set one of these."
        )
    return templates


def chosen(templates, choice, tools):
    """Returns the name, for errors, and the text of one template.

    Args:
        templates: the chat template of a tokenizer.
        choice: the name of one of several templates, the text of another, or None.
        tools: None selects the template named "default". Anything else selects "tool_use" if there is one.

    Raises:
        ValueError: if there is no template, or an argument has a wrong type.
    """
    if choice is not None and not isinstance(choice, str):
        raise ValueError(
            "The argument chat_template must be the name or the text of a template. Received: "
            f"{reprlib.repr(choice)}. Pass a string, or None for the template of the tokenizer."
        )
    if isinstance(checked(templates), dict):
        if choice is None:
            choice = "tool_use" if tools is not None and "tool_use" in templates else "default"
            if choice not in templates:
                raise ValueError(
                    "One of several chat templates must be chosen. Received: templates named "
                    f"{sorted(templates)}, none of which is 'default'. Pass chat_template= and a name."
                )
        if choice in templates:
            return f"chat_template[{choice!r}]", templates[choice]
    if choice is not None:
        return "the argument chat_template", choice
    if templates is None:
        raise ValueError(
            f"A conversation needs a template. Received: a tokenizer without {TEMPLATE} and without chat_template "
            "in tokenizer_config.json. Set its chat_template, or write the prompt yourself."
        )
    return "chat_template", templates


def files(templates):
    """Returns `{path in the folder: text}` of the chat template of a tokenizer.

    Raises:
        ValueError: if the template is no text, or a name is no file name.
    """
    templates = checked(templates)
    named = templates if isinstance(templates, dict) else {} if templates is None else {"default": templates}
    return {_file(name): text for name, text in named.items()}


def _file(name):
    file = f"{name}.jinja"
    if PurePath(file).name != file or "\0" in file:
        raise ValueError(
            f"The name of a chat template must be the name of a file. Received: {name!r}. Rename the template."
        )
    return Path(TEMPLATE) if name == "default" else Path(TEMPLATES, file)
