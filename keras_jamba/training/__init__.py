"""Training: the optimizer, recipes, data, monitoring, checkpointing and sharding."""

from keras_jamba.training import recipes
from keras_jamba.training.adamw import JambaAdamW, optimizer, schedule
from keras_jamba.training.checkpointing.checkpoint import Checkpoint
from keras_jamba.training.data import (
    Augmentation,
    Batches,
    ImageFolder,
    PackedConversations,
    PackedText,
    PhotoAugmentation,
    RandomAffine,
)
from keras_jamba.training.monitoring.monitor import Monitor
from keras_jamba.training.monitoring.probes import (
    ExpertUsage,
    GradientNorm,
    LearningRate,
    Memory,
    Throughput,
    Utilisation,
)
from keras_jamba.training.monitoring.profiling import Profile, largest_batch
from keras_jamba.training.parallel import DataParallel
from keras_jamba.training.recipes import Recipe
from keras_jamba.training.sharding import layout_map

__all__ = [
    "Augmentation",
    "Batches",
    "Checkpoint",
    "DataParallel",
    "ExpertUsage",
    "GradientNorm",
    "ImageFolder",
    "JambaAdamW",
    "LearningRate",
    "Memory",
    "Monitor",
    "PackedConversations",
    "PackedText",
    "PhotoAugmentation",
    "Profile",
    "RandomAffine",
    "Recipe",
    "Throughput",
    "Utilisation",
    "largest_batch",
    "layout_map",
    "optimizer",
    "recipes",
    "schedule",
]
