"""Engines run exported graphs; each is a ``Runner``."""

from rekd_deploy.runtimes.base import Runner

__all__ = ["Runner"]
