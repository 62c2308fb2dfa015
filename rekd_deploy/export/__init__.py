"""From a checkpoint to a repository."""
