"""Implementations that several backends share."""
