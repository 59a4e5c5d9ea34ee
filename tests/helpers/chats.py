"""A tokenizer of bytes with a chat template that marks answers, and conversations."""

import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from keras_jamba.tokenizers import JambaTokenizer

END = "<end>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    """Returns a JambaTokenizer with one token per byte, and END as token 0."""
    vocabulary = {text: i for i, text in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.add_special_tokens([END])
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        library.save(str(Path(folder, "tokenizer.json")))
        tokenizer = JambaTokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents):
    """Returns a conversation of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
