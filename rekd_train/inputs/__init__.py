"""Texts and images as tensors, and predictions as spans; torch-free."""
