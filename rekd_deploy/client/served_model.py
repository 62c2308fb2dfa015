"""The model behind an address, as a client knows it: what each of its versions says of itself. torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    ModelMissingError,
    RepositoryError,
    VersionMismatchError,
)
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded, Preprocessor


class ServedVersion(NamedTuple):
    """What was read from the server of one version of the model."""

    version: str
    description: ServedDescription
    preprocessor: Preprocessor
    max_batch_size: int


class ServedModel:
    """Reads versions of the model when they are first met, once. Safe to use from several threads.

    Args:
        url: of the server, for messages.
        name: of the ensemble or single graph.
        transport: what speaks to the server.
        preprocessing: fingerprint that the model must have; None: any.
    """

    def __init__(self, url: str, name: str, transport: Transport, preprocessing: str | None) -> None:
        self.url = url
        self.name = name
        self._transport = transport
        self._preprocessing = preprocessing
        self._versions: dict[str, ServedVersion] = {}
        self._newest: ServedVersion | None = None
        self._lock = threading.Lock()

    def known(self, version: str = "") -> ServedVersion | None:
        """What was read before: of a version, or of the newest where none is named."""
        return self._versions.get(version) if version else self._newest

    def prefer(self, version: ServedVersion) -> None:
        """Take this one as the newest: a response has just named it."""
        with self._lock:
            self._newest = version

    def read(self, version: str, remaining: Callable[[], float]) -> None:
        """Read a version, or the newest where none is named; ``known`` has it then. Blocks.

        Args:
            version: empty: the newest.
            remaining: seconds that may still be spent; raises DeadlineError when there are none.

        Raises:
            ClientError: of the kind that fits.
        """
        patience = remaining()
        if not self._lock.acquire(timeout=patience):  # another thread reads
            raise DeadlineError(f"no answer from {self.url} within {patience:g} s; fix: a longer timeout")
        try:
            if self.known(version) is not None:
                return  # another thread was quicker
            if not version:
                versions = self._transport.model_versions(self.name, remaining())
                version = max(filter(str.isdecimal, versions), key=int, default="")
                if not version:
                    raise ModelMissingError(f"the server at {self.url} has no version of '{self.name}' ready")
            parameters, max_batch_size = self._transport.model_config(self.name, version, remaining())
            self._newest = self._versions[version] = self._understood(version, parameters, max(max_batch_size, 1))
        finally:
            self._lock.release()

    def _understood(self, version: str, parameters: dict[str, str], max_batch_size: int) -> ServedVersion:
        try:
            description = ServedDescription.from_parameters(parameters)
            before = self._newest
            if before is not None and before.description == description:
                return ServedVersion(version, description, before.preprocessor, max_batch_size)
            preprocessor = description.preprocessor()
        except RepositoryError as error:
            raise VersionMismatchError(f"the model '{self.name}' at {self.url}: {error}") from None
        if self._preprocessing not in (None, description.fingerprint):
            raise VersionMismatchError(
                f"the model '{self.name}' at {self.url} was trained with the preprocessing "
                f"{description.fingerprint[:12]}, this client wants {self._preprocessing[:12]}; fix: use the "
                "server of the matching model, or leave out preprocessing to use the server's"
            )
        return ServedVersion(version, description, preprocessor, max_batch_size)

    def predictions(
        self, version: ServedVersion, encoded: Encoded, outputs: Arrays, request_id: str, items: Sequence[int] = ()
    ) -> list[Prediction]:
        """A batch's outputs as predictions.

        Args:
            request_id: of the batch, for messages.
            items: what each row is in the call, for messages; empty: not known.

        Raises:
            VersionMismatchError: outputs of other shapes than this version's.
            ClientError: probabilities that are no numbers.
        """
        labels = version.description.labels
        first = next(iter(encoded.inputs.values()))
        is_image = version.description.settings.kind == "image"
        rows, width = len(first), version.preprocessor.positions if is_image else first.shape[1]
        expected = {"scores": (rows, width), "mask": (rows, width), "probabilities": (rows, len(labels))}
        for name, shape in expected.items():
            found = None if outputs[name] is None else outputs[name].shape
            if found != shape:
                raise VersionMismatchError(
                    f"the model '{self.name}' at {self.url} gave {name} of shape {found}, expected {shape}; "
                    "fix: use the rekd version that exported it"
                )
        if len(bad := np.flatnonzero(~np.isfinite(outputs["probabilities"]).all(axis=1))):
            which = f", item {items[bad[0]]} of the call" if items else ""
            raise ClientError(
                f"the model '{self.name}' at {self.url} gave row {bad[0]} of request {request_id}{which}, with "
                "probabilities that are no numbers; its graph got ids or a mask that it cannot read, or overflowed in "
                "half precision; fix: rekd-export --verify the repository that is served, or export it in fp32"
            )
        return encoded.predictions(labels, outputs["probabilities"], outputs["mask"], outputs["scores"])
