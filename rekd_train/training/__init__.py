"""Stages, their losses, and what carries them."""
