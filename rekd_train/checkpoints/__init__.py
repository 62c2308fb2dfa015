"""Checkpoints: written, read, described."""
