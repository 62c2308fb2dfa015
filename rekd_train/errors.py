"""The error tree. Every message names the value, the limit and the fix.

    RekdError
    ├── ConfigError            a configuration is wrong; all mistakes in one message
    ├── DataError              a data set is missing, damaged or not what it should be
    ├── InputError             a text or image given for prediction cannot be used
    ├── CheckpointError        a checkpoint is missing, damaged or of another version
    ├── TrainingError          training diverged, collapsed or cannot go on
    ├── MissingExtraError      an optional dependency is not installed
    └── rekd_deploy.errors     export, repository, server and client errors (same root)
"""


class RekdError(Exception):
    """Root of all errors that REKD raises on purpose."""


class ConfigError(RekdError):
    """A configuration is wrong; the message lists every mistake at once."""


class DataError(RekdError):
    """A data set is missing, damaged or not what it should be."""


class InputError(RekdError):
    """A text or image given for prediction cannot be used."""


class CheckpointError(RekdError):
    """A checkpoint is missing, damaged or of another version."""


class TrainingError(RekdError):
    """Training diverged, collapsed or cannot go on."""


class MissingExtraError(RekdError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"the Python package '{module}' is not installed; fix: pip install 'rekd[{extra}]'"
        )
        self.module = module
        self.extra = extra
