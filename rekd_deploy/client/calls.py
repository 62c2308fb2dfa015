"""What a call needs: its time and its ids, and the version of the served model that it is made for. torch-free."""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ClientError, DeadlineError, ModelMissingError, RepositoryError, VersionMismatchError
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded, Preprocessor

GRACE = 0.5
"""Seconds by which the transport's own time-out, or the call's own end, may come first: they know more."""
_LONGEST_ID = 128
_KEPT_VERSIONS = 4
"""Of a model: each holds a tokenizer, and a client may outlive many. Two are met in an exchange."""


@dataclass
class Sent:
    """A request on its way; ``indices`` are those of its rows in the call, ``until`` is a ``time.monotonic``."""

    indices: list[int]
    encoded: Encoded
    request_id: str
    future: Future[Arrays] = field(default_factory=Future)
    until: float = 0.0


class Call:
    """The time, the ids and the end of one call; for arguments and InputErrors see ``Client.predict``.

    ``timeout``: seconds one request may take; ``cancellable``: another thread may cancel it.
    """

    def __init__(
        self, timeout: float, deadline: float | None = None, request_id: str | None = None, *, cancellable: bool = False
    ) -> None:
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline:g} s; it must be more than 0")
        if request_id is None:
            request_id = secrets.token_hex(8)
        elif not (isinstance(request_id, str) and request_id.isprintable() and 0 < len(request_id) <= _LONGEST_ID):
            raise InputError(f"request_id must be one line of 1..{_LONGEST_ID} printable characters")
        self.timeout = timeout
        self.deadline = deadline
        self.cancellable = cancellable
        self._until = float("inf") if deadline is None else time.monotonic() + deadline
        self._request_id = request_id
        self._numbers = count(1)
        self._cancelled = threading.Event()
        self._awaited: Future[Arrays] | None = None

    def next_id(self) -> str:
        """The id of the next request."""
        number = next(self._numbers)
        return self._request_id if number == 1 else f"{self._request_id}-{number}"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def remaining(self) -> float:
        """Seconds that the next request may take; raises DeadlineError or CancelledError."""
        if self._cancelled.is_set():
            raise CancelledError
        if self.left <= 0:
            raise self.too_late()
        return min(self.left, self.timeout)

    def too_late(self) -> DeadlineError:
        """The error of a call that is beyond its deadline."""
        what = f"the call was not finished within {self.deadline:g} s (request {self._request_id})"
        return DeadlineError(f"{what}; fix: a longer deadline")

    def result(self, sent: Sent) -> Arrays:
        """The response; ClientError: why there is none; CancelledError: the call was cancelled."""
        self._awaited = sent.future
        if self._cancelled.is_set():
            raise CancelledError
        try:
            return sent.future.result(max(sent.until + GRACE - time.monotonic(), 0))
        except TimeoutError:
            self.remaining()  # raises if it is the call's own deadline
            what = f"no answer within {self.timeout:g} s (request {sent.request_id})"
            raise DeadlineError(f"{what}; fix: a longer timeout") from None

    def pause(self, seconds: float) -> None:
        """Wait, or until it is cancelled."""
        self._cancelled.wait(seconds)

    def cancel(self) -> None:
        """End it: whatever it waits for raises CancelledError."""
        self._cancelled.set()
        if self._awaited is not None:
            self._awaited.cancel()


class Predictions(list[Prediction]):
    """One prediction an item, in the order of the items."""

    version: str = ""
    """Of the model that gave the last response; an exchange during the call is the only time there are two."""


class ServedVersion(NamedTuple):
    """What was read from the server of one version of the model."""

    version: str
    description: ServedDescription
    preprocessor: Preprocessor
    max_batch_size: int


class ServedModel:
    """The model behind an address; its versions are read when they are first met. Safe to use from several threads.

    ``preprocessing``: fingerprint that the model must have; None: any. ``wanted``: the only version to ask; empty: the
    newest.
    """

    def __init__(
        self, url: str, name: str, transport: Transport, preprocessing: str | None, wanted: str = ""
    ) -> None:
        self._url = url
        self.name = name
        self.wanted = wanted
        self.newest: ServedVersion | None = None
        """The last version that was read, or named by a response."""
        self.beside: ServedModel | None = None
        """A model that may have the same preprocessing, which takes long to read."""
        self._shown = f"the model '{name}' at {url}"
        self._transport = transport
        self._preprocessing = preprocessing
        self._versions: dict[str, ServedVersion] = {}
        self._reading = threading.Lock()

    def version(self, version: str, call: Call) -> ServedVersion:
        """What the server says of a version, read once; empty: the newest. ClientError: it cannot be used."""
        version = version or self.wanted
        if found := self._known(version):
            return found
        patience = call.remaining()
        if not self._reading.acquire(timeout=patience):  # another thread reads
            raise DeadlineError(f"no answer from {self._url} within {patience:g} s; fix: a longer timeout")
        try:
            if found := self._known(version):  # another thread was quicker
                return found
            if not version:
                versions = self._transport.model_versions(self.name, call.remaining())
                version = max(filter(str.isdecimal, versions), key=int, default="")
                if not version:
                    raise ModelMissingError(f"the server at {self._url} has no version of '{self.name}' ready")
            parameters, max_batch_size = self._transport.model_config(self.name, version, call.remaining())
            self.newest = ServedVersion(version, *self._understood(parameters), max(max_batch_size, 1))
            self._versions[version] = found = self.newest
            while len(self._versions) > _KEPT_VERSIONS:
                del self._versions[next(iter(self._versions))]
            return found
        finally:
            self._reading.release()

    def _known(self, version: str) -> ServedVersion | None:
        return self._versions.get(version) if version else self.newest

    def _understood(self, parameters: dict[str, str]) -> tuple[ServedDescription, Preprocessor]:
        try:
            description = ServedDescription.from_parameters(parameters)
            for known in (self.newest, self.beside and self.beside.newest):
                if known is not None and known.description == description:
                    return description, known.preprocessor
            preprocessor = description.preprocessor()
        except RepositoryError as error:
            raise VersionMismatchError(f"{self._shown}: {error}") from None
        if self._preprocessing not in (None, description.fingerprint):
            raise VersionMismatchError(
                f"{self._shown} was trained with the preprocessing {description.fingerprint[:12]}, this client wants "
                f"{self._preprocessing[:12]}; fix: use the server of the matching model, or leave out preprocessing to "
                "use the server's"
            )
        return description, preprocessor

    def predictions(self, version: ServedVersion, sent: Sent, outputs: Arrays, windows: bool) -> list[Prediction]:
        """A response as predictions; VersionMismatchError: outputs of other shapes; ClientError: not of numbers."""
        labels, encoded = version.description.labels, sent.encoded
        first = next(iter(encoded.inputs.values()))
        is_image = version.description.settings.kind == "image"
        width = version.preprocessor.positions if is_image else first.shape[1]
        for name, columns in {"scores": width, "mask": width, "probabilities": len(labels)}.items():
            expected, found = (len(first), columns), getattr(outputs[name], "shape", None)
            if found != expected:
                raise VersionMismatchError(
                    f"{self._shown} gave {name} of shape {found}, expected {expected}; fix: use the rekd version that "
                    "exported it"
                )
        if len(bad := np.flatnonzero(~np.isfinite(outputs["probabilities"]).all(axis=1))):
            item = "" if windows else f", item {sent.indices[bad[0]]} of the call"
            raise ClientError(
                f"{self._shown} gave row {bad[0]} of request {sent.request_id}{item}, with probabilities that are no "
                "numbers; its graph got ids or a mask that it cannot read, or overflowed in half precision; fix: "
                "rekd-export --verify the repository that is served, or export it in fp32"
            )
        return encoded.predictions(labels, outputs["probabilities"], outputs["mask"], outputs["scores"])
