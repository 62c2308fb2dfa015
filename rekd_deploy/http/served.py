"""The models behind the server, through our own client. torch-free."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from rekd_deploy.client.calls import Predictions
from rekd_deploy.client.client import AsyncClient
from rekd_deploy.client.transport import Transport, open_transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ModelMissingError, VersionMismatchError
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_train.errors import InputError

_MOST_CLIENTS = 4
"""Of each model."""
_PROBE_SECONDS = 5.0


class _Opened(NamedTuple):
    client: AsyncClient
    description: ServedDescription


class Served:
    """The models of a Triton server; one connection for all of them. Errors are the client's.

    Args:
        url: see ``Client``.
        seconds: a call may take.
        transport: what speaks to the server, instead of the one that ``url`` names.
        beside: names of models that stand there beside ours.
    """

    def __init__(
        self, url: str, seconds: float, transport: Transport | None = None, beside: Sequence[str] = ()
    ) -> None:
        self.url = url
        self.models = (ENSEMBLE, SINGLE, *beside)
        """The only names that Triton is asked for."""
        self._seconds = seconds
        self._transport = transport or open_transport(url, seconds)
        self._opened: dict[tuple[str, str], _Opened] = {}

    async def close(self) -> None:
        """Close the connection; calls on their way fail."""
        await asyncio.to_thread(self._transport.close)

    async def versions(self, model: str = ENSEMBLE) -> list[str]:
        """Versions of a model that are ready, the newest first; asked anew each time."""
        if model not in self.models:
            raise ModelMissingError(f"the model '{model[:64]}' is not served; fix: one of {', '.join(self.models)}")
        patience = min(self._seconds, _PROBE_SECONDS)
        found = await asyncio.to_thread(self._transport.model_versions, model, patience)
        return sorted(filter(str.isdecimal, found), key=int, reverse=True)

    async def description(self, model: str, version: str = "") -> ServedDescription:
        """What the server says of a model's version; empty: the newest."""
        return (await self._open(model, version)).description

    async def predict(
        self, items: Sequence[Any], kind: str, *, model: str, version: str = "", windows: bool = False, request_id: str
    ) -> Predictions:
        """See ``AsyncClient.predict``.

        Args:
            kind: 'text' or 'image', what ``items`` are. A model of the other kind is an InputError: it would take a
                text for the path of a file on this machine.
        """
        opened = await self._open(model, version)
        for last in (False, True):
            reads = opened.description.settings.kind
            if reads != kind:
                raise InputError(f"the model '{model}' reads {reads}s, not {kind}s; fix: send {_HOW[reads]}")
            try:
                return await opened.client.predict(
                    items, windows=windows, deadline=self._seconds, request_id=request_id
                )
            except (VersionMismatchError, ModelMissingError):  # another model is behind the address
                self._opened.pop((model, version), None)
                if last:
                    raise
                opened = await self._open(model, version)
        raise AssertionError("not reached")

    async def _open(self, model: str, version: str) -> _Opened:
        """A client that holds the model to what its description says."""
        if found := self._opened.get((model, version)):
            return found
        versions = await self.versions(model)
        if version and version not in versions:
            raise ModelMissingError(
                f"version {version} of the model '{model}' is not served; fix: one of {', '.join(versions) or 'none'}, "
                "or leave version out"
            )
        options = {"model": model, "version": version, "transport": self._transport, "timeout": self._seconds}
        description = await AsyncClient(self.url, **options).description()
        client = AsyncClient(self.url, preprocessing=description.fingerprint, **options)
        while len(self._opened) >= _MOST_CLIENTS * len(self.models):
            self._opened.pop(next(iter(self._opened)))
        return self._opened.setdefault((model, version), _Opened(client, description))


_HOW = {"text": 'JSON such as {"texts": ["..."]}', "image": "the files as multipart/form-data"}
