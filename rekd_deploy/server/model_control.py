"""Triton's model-repository interface, with the key: load a model, and say which versions are in which state."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rekd_deploy.errors import ServerError
from rekd_deploy.server.flags import GRPC_KEY_HEADER

READY = "READY"
_GONE = ("", "UNAVAILABLE")


class ModelControl:
    """A connection to the server's administration, as a context manager.

    Over gRPC, where loading holds up no answer: over HTTP it would hold up the connections that share its thread.

    Args:
        grpc_url: HOST:PORT.
        key: of the restricted interfaces.
        load_seconds: how long loading one model may take.
    """

    def __init__(self, grpc_url: str, key: str, load_seconds: float = 600.0) -> None:
        import tritonclient.grpc

        self._headers = {GRPC_KEY_HEADER: key}
        self._load_seconds = load_seconds
        self._client = tritonclient.grpc.InferenceServerClient(grpc_url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, model: str) -> None:
        """Load a model again as its folder is now; versions that served serve on until the others are ready.

        Raises:
            ServerError: it does not load; what served before still does.
        """
        from tritonclient.utils import InferenceServerException

        try:
            self._client.load_model(model, headers=self._headers, client_timeout=self._load_seconds)
        except InferenceServerException as error:
            reason = " ".join(str(error.message()).split())
            raise ServerError(f"the server did not load {model}: {reason}") from None

    def unload(self, model: str) -> None:
        """Let a model go.

        Raises:
            ServerError: it stays.
        """
        from tritonclient.utils import InferenceServerException

        try:
            self._client.unload_model(model, headers=self._headers, client_timeout=self._load_seconds)
        except InferenceServerException as error:
            raise ServerError(f"the server did not unload {model}: {error.message()}") from None

    def states(self) -> dict[str, dict[int, str]]:
        """Model -> version -> READY, LOADING, UNLOADING; versions that are gone are left out.

        Raises:
            ServerError: the server does not say.
        """
        from tritonclient.utils import InferenceServerException

        try:
            index = self._client.get_model_repository_index(headers=self._headers, client_timeout=30.0)
        except InferenceServerException as error:
            raise ServerError(f"the server does not tell its models: {error.message()}") from None
        found: dict[str, dict[int, str]] = {}
        for entry in index.models:
            versions = found.setdefault(entry.name, {})
            if entry.version and entry.state not in _GONE:
                versions[int(entry.version)] = entry.state
        return found

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()
