"""Special tokens that the files of a checkpoint name, read as transformers reads them."""

NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The tokenizer class of Mamba-1. It has its own default special tokens, and adds none of them to a text.
GPT_NEOX = "GPTNeoXTokenizer"
_OF_GPT_NEOX = {name: "<|endoftext|>" for name in ("unk_token", "bos_token", "eos_token")} | {
    "pad_token": "<|padding|>"
}

CONFIG, LEGACY = "tokenizer_config.json", "special_tokens_map.json"
_ID_DIGITS = 18
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


def source(name, config, legacy):
    """Returns the name of the file that gives a special token: `legacy` overrides `config` without token ids."""
    return LEGACY if name in legacy and "added_tokens_decoder" not in config else CONFIG


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
    files = {name: source(name, config, legacy) for name in names}
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= extra
        files |= dict.fromkeys(extra, source("extra_special_tokens", config, legacy))
    if config.get("tokenizer_class") == GPT_NEOX:
        for name, token in _OF_GPT_NEOX.items():
            if found[name] is None and library.token_to_id(token) is not None:
                found[name] = token
    return {name: _token(token, name, files[name]) for name, token in found.items() if token is not None}


def add_special_tokens(library, config, special):
    """Adds special tokens to the library's tokenizer, which then never splits them and omits them when decoding.

    Args:
        library, config: see `special_tokens`.
        special: the result of `special_tokens`.
    """
    from tokenizers import processors

    if config.get("tokenizer_class") == GPT_NEOX:
        library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    library.encode_special_tokens = bool(config.get("split_special_tokens", False))
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(i.isdecimal() and len(i) <= _ID_DIGITS for i in listed):
        raise ValueError(
            f"added_tokens_decoder must map token ids to tokens. Received: {str(listed)[:60]!r} in {CONFIG}. Download "
            "the checkpoint again."
        )
    listed = [_listed(token) for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]
    tokens = [token for token in listed if repr(known.get(token.content)) != repr(token)]
    kind = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra = config.get(kind) or ()
    extra = [_token(token, kind, CONFIG) for token in (extra.values() if isinstance(extra, dict) else extra)]
    named = {token.content for token in listed} | known.keys()
    more = {token.content: token for token in (*special.values(), *extra)}
    tokens += [token for content, token in more.items() if content not in named]
    if tokens:
        library.add_tokens(tokens)


def _listed(token):
    """Returns the AddedToken of an entry of added_tokens_decoder."""
    from tokenizers import AddedToken

    if not isinstance(token, dict):
        raise ValueError(
            f"added_tokens_decoder must map token ids to dicts. Received: {token!r} in {CONFIG}. Download the "
            "checkpoint again."
        )
    return AddedToken(**token)


def _token(token, name, file):
    """Returns the AddedToken of a file's entry: a string, or a dict with its content and matching flags."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {flag: token[flag] for flag in _FLAGS if flag in token} if isinstance(token, dict) else {}
    good = isinstance(token, dict) and isinstance(token.get("content"), str)
    if not good or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(
            "A special token must be a string, or a dict with one as content and with flags, true or false. Received: "
            f"{name}={token!r} in {file}. Download the checkpoint again."
        )
    return AddedToken(token["content"], special=True, **flags)
