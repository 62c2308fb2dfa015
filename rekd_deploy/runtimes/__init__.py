"""Engines that run exported graphs; each is a ``base.Runner``."""
