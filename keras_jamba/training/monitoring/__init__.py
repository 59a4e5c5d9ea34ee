"""Monitoring of a training run: `Monitor` and its probes, `Profile`, and the largest batch that fits."""
