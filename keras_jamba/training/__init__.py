"""Training as it is really done: the optimizer, monitoring, resuming, estimates and data."""

from keras_jamba.training import recipes
from keras_jamba.training.adamw import JambaAdamW, optimizer, schedule
from keras_jamba.training.callbacks import (
    ExpertUsage,
    GradientNorm,
    LearningRate,
    Memory,
    Monitor,
    Throughput,
    Utilisation,
)
from keras_jamba.training.checkpoint import Checkpoint
from keras_jamba.training.data import Augmentation, Batches, ImageFolder, PackedText, RandomAffine
from keras_jamba.training.estimators import kv_cache_bytes, model_report
from keras_jamba.training.parallel import DataParallel
from keras_jamba.training.profiling import Profile, largest_batch
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
    "PackedText",
    "Profile",
    "RandomAffine",
    "Recipe",
    "Throughput",
    "Utilisation",
    "kv_cache_bytes",
    "largest_batch",
    "layout_map",
    "model_report",
    "optimizer",
    "recipes",
    "schedule",
]
