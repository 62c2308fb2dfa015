"""Files that are copied into Triton, where nothing of ours is installed."""
