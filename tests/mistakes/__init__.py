"""Mistakes that users make, with the entry point and the outcome of each.

Run `python -m mistakes` in `tests` to write the tables of docs/guides/mistakes.md.
"""

from mistakes.images import IMAGES
from mistakes.parts import EXTRAS, LAYERS
from mistakes.subjects import NAN, RIGHT
from mistakes.text import TEXT

MISTAKES = IMAGES + TEXT + LAYERS + EXTRAS

_TOKENIZERS = "JambaTokenizer and ByteTokenizer"
_PRESETS, _WEIGHTS = "from_preset and save_to_preset", "quantize, enable_lora, merge_lora and load_lora"
# The headings of the page in their order. Each has a table.
_HEADINGS = ("DHCJamba", "JambaCausalLM", "JambaClassifier", "JambaBackbone", "MambaLayer", "AttentionLayer")
_HEADINGS += ("MoELayer", "Sampler", "PromptState", _TOKENIZERS, "ImageFolder", "visualize", _PRESETS, _WEIGHTS)
# `{entry point: heading}` of entry points whose heading is not the class of their list or their own name.
_HEADING_OF = {
    "Bidirectional": "MambaLayer",
    "PromptState.load": "PromptState",
    "draw_saliency": "visualize",
    "from_preset": _PRESETS,
    "save_to_preset": _PRESETS,
    **dict.fromkeys(("tokenizer", "load_tokenizer"), _TOKENIZERS),
    **dict.fromkeys(("quantize", "enable_lora", "merge_lora", "load_lora"), _WEIGHTS),
}


def tables():
    """Returns the headings and tables of docs/guides/mistakes.md."""
    rows = {heading: [] for heading in _HEADINGS}
    for mistake in MISTAKES:
        outcome = mistake.outcome if mistake.outcome in (RIGHT, NAN) else "an error"
        rows[_heading(mistake)].append(f"| `{mistake.entry}` | {mistake.name} | {outcome} |\n")
    top = "| entry point | mistake | outcome |\n| --- | --- | --- |\n"
    return "\n".join(f"## {heading}\n\n{top}{''.join(found)}" for heading, found in rows.items())


def _heading(mistake):
    if mistake.entry in (*_HEADING_OF, *_HEADINGS):
        return _HEADING_OF.get(mistake.entry, mistake.entry)
    if mistake in IMAGES:
        return "DHCJamba"
    return "JambaClassifier" if "classifier" in mistake.name else "JambaCausalLM"
