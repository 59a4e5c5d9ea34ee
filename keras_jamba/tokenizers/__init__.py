"""Tokenizers: text to token ids and back."""

from keras_jamba.tokenizers.byte_tokenizer import ByteTokenizer
from keras_jamba.tokenizers.files import load_tokenizer, save_tokenizer
from keras_jamba.tokenizers.jamba_tokenizer import JambaTokenizer

__all__ = ["ByteTokenizer", "JambaTokenizer", "load_tokenizer", "save_tokenizer"]
