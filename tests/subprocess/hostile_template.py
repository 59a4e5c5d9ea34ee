"""Renders one hostile template and prints its time, the growth of the peak memory, and its error."""

import json
import resource
import sys
import time

import hostile_templates

from keras_jamba.tokenizers import chat_templates

UNIT = 1 if sys.platform == "darwin" else 1024


def main(kind, name):
    talk = [{"role": "user", "content": "hi"}]
    chat_templates.render("{{ messages|tojson }}", talk, {})
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    error = None
    try:
        chat_templates.render(getattr(hostile_templates, kind)[name], talk, {})
    except ValueError as found:
        error = str(found)
    seconds = time.perf_counter() - started
    size = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * UNIT
    print(json.dumps({"seconds": seconds, "bytes": size, "error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
