"""Graphs compared with the model."""
