"""Files that run a repository in production, all rendered from one set of settings."""
