"""Renders hostile templates and prints, per name, the time, the growth of the peak memory, and the error."""

import json
import resource
import sys
import time

import hostile_templates

from keras_jamba.tokenizers import chat_templates

UNIT = 1 if sys.platform == "darwin" else 1024
TALK = [{"role": "user", "content": "hi"}]


def measured(template, before):
    started, error = time.process_time(), None
    try:
        chat_templates.render(template, TALK, {})
    except ValueError as found:
        error = str(found)
    seconds = time.process_time() - started
    size = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * UNIT
    return {"seconds": seconds, "bytes": size, "error": error}


def main(kind, *names):
    chat_templates.render("{{ messages|tojson }}", TALK, {})
    templates, before = getattr(hostile_templates, kind), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({name: measured(templates[name], before) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
