"""Layers of image models: encoders, tokens and readouts."""
