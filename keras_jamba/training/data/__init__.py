"""Data as a pure function of seed and step: batches of arrays, packed text, pictures, clips, and augmentation."""

from keras_jamba.training.data.augmentation import Augmentation
from keras_jamba.training.data.batches import Batches
from keras_jamba.training.data.image_folder import ImageFolder
from keras_jamba.training.data.packed_conversations import PackedConversations
from keras_jamba.training.data.packed_text import PackedText
from keras_jamba.training.data.photo_augmentation import PhotoAugmentation
from keras_jamba.training.data.random_affine import RandomAffine

__all__ = [
    "Augmentation",
    "Batches",
    "ImageFolder",
    "PackedConversations",
    "PackedText",
    "PhotoAugmentation",
    "RandomAffine",
]
