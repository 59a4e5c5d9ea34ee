"""Saving a training run and resuming it: `Checkpoint`."""
