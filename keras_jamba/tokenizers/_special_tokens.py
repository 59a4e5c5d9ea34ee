"""Special tokens of a checkpoint: what its files name, as transformers reads them."""

NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The class of Mamba-1's tokenizers. It has names for special tokens of its own, and adds none of them to a text.
GPT_NEOX = "GPTNeoXTokenizer"
_OF_GPT_NEOX = {name: "<|endoftext|>" for name in ("unk_token", "bos_token", "eos_token")} | {
    "pad_token": "<|padding|>"
}

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def tokenizer_class(config, model_config):
    """The class of transformers by which a tokenizer is read: it depends on the model beside it too."""
    found, model_type = config.get("tokenizer_class"), model_config.get("model_type")
    if found is None:
        return GPT_NEOX if model_type == "mamba" else None
    if found.removesuffix("Fast") != GPT_NEOX:
        return found
    # Beside a Jamba this class is taken for a mistake.
    return "PreTrainedTokenizerFast" if model_type == "jamba" else GPT_NEOX


def special_tokens(library, config, legacy):
    """The tokens that are named, `{"bos_token": AddedToken of the library tokenizers, ...}`.

    Args:
        library: the tokenizer of the library tokenizers.
        config: tokenizer_config.json.
        legacy: special_tokens_map.json, which counts before it where tokens are not listed there with their ids.
    """
    named = config if "added_tokens_decoder" in config else config | legacy
    # Others that end so are the model's own, for its template.
    names = (*NAMES, *(name for name, x in named.items() if name.endswith("_token") and isinstance(x, str)))
    found = {name: named.get(name) for name in names}
    extra = named.get("extra_special_tokens")
    found |= extra if isinstance(extra, dict) else {}
    if config.get("tokenizer_class") == GPT_NEOX:
        for name, token in _OF_GPT_NEOX.items():
            if found[name] is None and library.token_to_id(token) is not None:
                found[name] = token
    return {name: _token(token) for name, token in found.items() if token is not None}


def add_special_tokens(library, config, special):
    """Makes the library see special tokens as transformers does: each whole in a text, and left out when decoding.

    Args:
        library, config: see `special_tokens`.
        special: what that returned.
    """
    from tokenizers import AddedToken, processors

    if config.get("tokenizer_class") == GPT_NEOX:
        library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    library.encode_special_tokens = bool(config.get("split_special_tokens", False))
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    listed = [AddedToken(**token) for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]
    tokens = [token for token in listed if repr(known.get(token.content)) != repr(token)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = map(_token, extra.values() if isinstance(extra, dict) else extra)
    named = {token.content for token in listed} | known.keys()
    more = {token.content: token for token in (*special.values(), *extra)}
    tokens += [token for content, token in more.items() if content not in named]
    if tokens:
        library.add_tokens(tokens)


def _token(token):
    """An AddedToken of what a file holds: the text, or a dict with how it is found in a text."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(
            f"A special token must be a string, or a dict with one as content. Received: {token!r} in "
            "tokenizer_config.json or special_tokens_map.json. Download the checkpoint again."
        )
    given = {name: token[name] for name in _FLAGS if name in token}
    return AddedToken(token["content"], special=True, **given)
