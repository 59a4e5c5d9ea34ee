"""Handles of models on huggingface.co."""

from pathlib import Path

from keras_jamba import presets

HUGGING_FACE = "hf://"
# The last pattern is for presets of this package. Weights in other formats may contain code and are not downloaded.
_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.safetensors", "model.weights.h5")


def folder_of(preset):
    """Returns the folder of a built-in preset, of a checkpoint on disk, or of a downloaded `hf://owner/name`.

    Raises:
        ValueError: if there is no such folder, or the handle is malformed.
        ImportError: for a handle, if huggingface_hub is not installed.
    """
    if not str(preset).startswith(HUGGING_FACE):
        return presets.folder_of(preset)
    handle = str(preset).removeprefix(HUGGING_FACE)
    name, _, revision = handle.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(
            f"A handle must be {HUGGING_FACE}owner/name or {HUGGING_FACE}owner/name@revision. "
            f"Received: {str(preset)!r}. Copy owner/name from the model's page."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"Handles that begin with {HUGGING_FACE} are downloaded with huggingface_hub. "
            'Received: a Python without it. Install it: pip install "keras-jamba[text]".'
        ) from error
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES)))
