"""A Triton model repository: written, read, verified. torch-free."""
