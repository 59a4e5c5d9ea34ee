"""Saving and resuming a training run: `Checkpoint`."""
