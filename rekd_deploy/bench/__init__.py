"""Measurements: what an answer costs. The commands and scripts that print figures are built from these."""
