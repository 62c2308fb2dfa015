"""A Triton process: started, watched, reloaded. torch-free."""
