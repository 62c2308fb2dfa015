"""Predictions from a Triton server: texts or images in, ``Prediction`` out. torch-free.

    with Client("localhost:8001") as client:
        client.predict(["A film of great warmth."])
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from rekd_deploy.batching import item_batches
from rekd_deploy.errors import ClientError, RepositoryError, VersionMismatchError
from rekd_deploy.served import ServedDescription
from rekd_deploy.transport import IN_FLIGHT, Arrays, Transport, open_transport
from rekd_deploy.triton_config import ENSEMBLE
from rekd_train.prediction import Prediction
from rekd_train.preprocessors import Encoded, Preprocessor

_OUTPUTS = ("scores", "mask", "probabilities")


class _Served(NamedTuple):
    """What was read from the server."""

    description: ServedDescription
    preprocessor: Preprocessor
    max_batch_size: int


class _Answer(NamedTuple):
    """One batch's outputs."""

    places: list[int]
    encoded: Encoded
    outputs: Arrays

    @classmethod
    def wait_for(cls, places: list[int], encoded: Encoded, future: Future[Arrays]) -> _Answer:
        return cls(places, encoded, future.result())


class Client:
    """Asks the ensemble of a Triton server; labels and preprocessing come from the server, once.

    Safe to use from several threads. Use it as a context manager, or call ``close()``.

    Args:
        url: HOST:PORT for gRPC, http://HOST:PORT for HTTP.
        model: name of the ensemble, or of the single graph (rekd_single) where it is served.
        timeout: seconds an answer may take.
        preprocessing: fingerprint (``Preprocessor.fingerprint``) that the served model must have;
            None: whatever is served.
        transport: what speaks to the server; None: chosen by ``url``.

    Raises:
        ClientError: the address is none. The server is first asked by ``predict``.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        model: str = ENSEMBLE,
        timeout: float = 30.0,
        preprocessing: str | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self._preprocessing = preprocessing
        self._transport = transport or open_transport(url, timeout)
        self._served: _Served | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._transport.close()

    @property
    def description(self) -> ServedDescription:
        """What the server says about the model.

        Raises:
            ClientError: as ``predict``.
        """
        return self._read_served().description

    def predict(self, items: Sequence[Any]) -> list[Prediction]:
        """Label, probabilities and rationale of each text or image, in the order of ``items``.

        Any number: they are sent in batches, texts of similar length together, several at a time.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.

        Raises:
            InputError: an empty list or an item that cannot be used.
            ServerUnavailableError: nothing answers at the address.
            DeadlineError: no answer in time.
            ModelMissingError: the server does not serve the model.
            VersionMismatchError: client and served model do not belong together.
            RejectedError: the server refused the request.
        """
        served = self._read_served()
        answers: dict[int, Prediction] = {}
        for places, encoded, outputs in self._pipelined(
            item_batches(served.preprocessor, items, served.max_batch_size)
        ):
            for place, prediction in zip(places, self._decoded(served, encoded, outputs), strict=True):
                answers[place] = prediction
        return [answers[place] for place in range(len(answers))]

    def _pipelined(self, pending: Iterable[tuple[list[int], Encoded]]) -> Iterator[_Answer]:
        """Answers in the order sent, with a few requests on their way."""
        waiting: deque[tuple[list[int], Encoded, Future[Arrays]]] = deque()
        try:
            for places, encoded in pending:
                waiting.append((places, encoded, self._transport.submit(self.model, encoded.inputs, _OUTPUTS)))
                if len(waiting) >= IN_FLIGHT:
                    yield _Answer.wait_for(*waiting.popleft())
            while waiting:
                yield _Answer.wait_for(*waiting.popleft())
        finally:
            for _, _, future in waiting:
                future.cancel()

    def _decoded(self, served: _Served, encoded: Encoded, outputs: Arrays) -> list[Prediction]:
        first = next(iter(encoded.inputs.values()))
        is_image = served.description.settings.kind == "image"
        rows, width = len(first), served.preprocessor.positions if is_image else first.shape[1]
        expected = {
            "scores": (rows, width), "mask": (rows, width), "probabilities": (rows, len(served.description.labels)),
        }
        for name, shape in expected.items():
            found = None if outputs[name] is None else outputs[name].shape
            if found != shape:
                raise VersionMismatchError(
                    f"the model '{self.model}' at {self.url} answered {name} of shape {found}, expected {shape}; "
                    "fix: use the rekd version that exported it"
                )
        if not np.isfinite(outputs["probabilities"]).all():
            raise ClientError(f"the model '{self.model}' at {self.url} answered probabilities that are no numbers")
        labels = served.description.labels
        return encoded.predictions(labels, outputs["probabilities"], outputs["mask"], outputs["scores"])

    def _read_served(self) -> _Served:
        with self._lock:
            if self._served is None:
                parameters, max_batch_size = self._transport.model_config(self.model)
                try:
                    description = ServedDescription.from_parameters(parameters)
                    preprocessor = description.preprocessor()
                except RepositoryError as error:
                    raise VersionMismatchError(f"the model '{self.model}' at {self.url}: {error}") from None
                if self._preprocessing not in (None, description.fingerprint):
                    raise VersionMismatchError(
                        f"the model '{self.model}' at {self.url} was trained with the preprocessing "
                        f"{description.fingerprint[:12]}, this client wants {self._preprocessing[:12]}; fix: ask the "
                        "server of the matching model, or leave out preprocessing to use the server's"
                    )
                self._served = _Served(description, preprocessor, max(max_batch_size, 1))
            return self._served
