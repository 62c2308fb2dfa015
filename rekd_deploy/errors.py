"""The deployment half's errors, under the same root.

    rekd_train.errors.RekdError
    └── DeployError
        ├── ExportError              a checkpoint cannot be turned into a graph
        │   └── ParityError          a graph does not compute what the model computes; nothing is published
        ├── EngineError              an engine cannot load or run a graph
        ├── RepositoryError          a model repository is missing, damaged or would not load
        ├── ServerError              the Triton server cannot start or has died
        ├── BenchmarkError           a measurement cannot be made or read, or a check that it holds has failed
        └── ClientError              a query failed
            ├── ServerUnavailableError   nothing answers at the address
            │   └── ServerBusyError      it answers that its queue is full
            ├── InsecureServerError      no trusted TLS connection can be made
            ├── DeadlineError            no answer in time
            ├── ModelMissingError        the server does not serve the model
            ├── VersionMismatchError     client preprocessing and served model do not belong together
            └── RejectedError            the server refused the request
"""

from rekd_train.errors import RekdError


class DeployError(RekdError):
    """Root of the deployment half's errors."""


class ExportError(DeployError):
    """A checkpoint cannot be turned into a graph."""


class ParityError(ExportError):
    """A graph does not compute what the model computes; nothing is published."""


class EngineError(DeployError):
    """An engine cannot load or run a graph."""


class RepositoryError(DeployError):
    """A model repository is missing, damaged or would not load."""


class ServerError(DeployError):
    """The Triton server cannot start or has died."""


class BenchmarkError(DeployError):
    """A measurement cannot be made or read, or a check that it holds has failed."""


class ClientError(DeployError):
    """A query failed."""


class ServerUnavailableError(ClientError):
    """Nothing answers at the address."""


class ServerBusyError(ServerUnavailableError):
    """The server answers that its queue is full."""


class InsecureServerError(ClientError):
    """No trusted TLS connection can be made."""


class DeadlineError(ClientError):
    """No answer in time."""


class ModelMissingError(ClientError):
    """The server does not serve the model."""


class VersionMismatchError(ClientError):
    """Client preprocessing and served model do not belong together."""


class RejectedError(ClientError):
    """The server refused the request."""
