"""Data whose order is a pure function of seed and step: batches of arrays, packed text, pictures and clips."""

from keras_jamba.training.data.batches import Batches
from keras_jamba.training.data.image_folder import ImageFolder
from keras_jamba.training.data.packed_text import PackedText

__all__ = ["Batches", "ImageFolder", "PackedText"]
