"""Special tokens that the files of a checkpoint name, read as transformers reads them."""

NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The tokenizer class of Mamba-1. It has its own default special tokens, and adds none of them to a text.
GPT_NEOX = "GPTNeoXTokenizer"
_OF_GPT_NEOX = {name: "<|endoftext|>" for name in ("unk_token", "bos_token", "eos_token")} | {
    "pad_token": "<|padding|>"
}

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def tokenizer_class(config, model_config):
    """Returns the transformers class that reads a tokenizer. It also depends on the model in the same folder."""
    found, model_type = config.get("tokenizer_class"), model_config.get("model_type")
    if found is None:
        return GPT_NEOX if model_type == "mamba" else None
    if found.removesuffix("Fast") != GPT_NEOX:
        return found
    # transformers treats this class in the folder of a Jamba model as a mistake, and replaces it.
    return "PreTrainedTokenizerFast" if model_type == "jamba" else GPT_NEOX


def special_tokens(library, config, legacy):
    """Returns the named special tokens, `{"bos_token": AddedToken of the library tokenizers, ...}`.

    Args:
        library: the tokenizer of the library tokenizers.
        config: the fields of tokenizer_config.json.
        legacy: the fields of special_tokens_map.json. They override `config` if it lists no tokens with their ids.

    Raises:
        ValueError: if a token is neither a string nor a dict with one as content.
    """
    named = config if "added_tokens_decoder" in config else config | legacy
    # Other names that end in `_token` are special tokens for the chat template.
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
    """Adds special tokens to the library's tokenizer, which then never splits them and omits them when decoding.

    Args:
        library, config: see `special_tokens`.
        special: the result of `special_tokens`.
    """
    from tokenizers import AddedToken, processors

    if config.get("tokenizer_class") == GPT_NEOX:
        library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    library.encode_special_tokens = bool(config.get("split_special_tokens", False))
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(token_id.isdecimal() for token_id in listed):
        raise ValueError(
            f"added_tokens_decoder must map token ids to tokens. Received: {str(listed)[:60]!r} in "
            "tokenizer_config.json. Download the checkpoint again."
        )
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
    """Returns the AddedToken of a file's entry: a string, or a dict with its content and matching flags."""
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
