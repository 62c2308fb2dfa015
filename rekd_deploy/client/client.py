"""Predictions from a Triton server: texts or images in, ``Prediction`` out. torch-free.

    with Client("localhost:8001") as client:
        client.predict(["A film of great warmth."])

    async with AsyncClient("localhost:8001") as client:
        await client.predict(["A film of great warmth."])
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from rekd_deploy.client.calls import Call, Caller
from rekd_deploy.client.connection import RetryPolicy, TlsSettings
from rekd_deploy.client.transport import Transport, open_transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ClientError
from rekd_deploy.repository.config import ENSEMBLE
from rekd_train.inputs.prediction import Prediction

CALLS = 64
"""Calls of one AsyncClient that are made at once, each in a thread; more wait their turn."""
_GRACE = 1.0
"""Seconds by which a call's own end at its deadline, which says more, may come first."""
Result = TypeVar("Result")


class _ClientOptions:
    """What both clients take and hold."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        model: str = ENSEMBLE,
        timeout: float = 30.0,
        preprocessing: str | None = None,
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        tls: TlsSettings | None = None,
        transport: Transport | None = None,
    ) -> None:
        if not timeout > 0:
            raise ClientError(f"timeout is {timeout:g} s; it must be more than 0")
        self.url = url
        self.model = model
        self._timeout = timeout
        transport = transport or open_transport(url, timeout, headers=headers, tls=tls)
        self._caller = Caller(url, model, transport, retry or RetryPolicy(), preprocessing)
        self._threads = ThreadPoolExecutor(CALLS, "rekd-client")  # AsyncClient's; none starts before it is used


class Client(_ClientOptions):
    """Predictions of a Triton server's ensemble; labels and preprocessing come from the server.

    Safe to use from several threads, which share its connections. Use it as a context manager, or call ``close()``.

    Args:
        url: HOST:PORT (or grpc://HOST:PORT) for gRPC, http://HOST:PORT for HTTP; with TLS grpcs:// and https://.
        model: name of the ensemble, or of the single graph (rekd_single) where it is served.
        timeout: seconds one request may take.
        preprocessing: fingerprint (``Preprocessor.fingerprint``) that the served model must have;
            None: whatever is served.
        retry: when a request is sent again that found no server, or its queue full; None: ``RetryPolicy()``.
        headers: sent with every request, such as {"authorization": "Bearer ..."}.
        tls: which server to trust and who the client is, for grpcs:// and https://.
        transport: what speaks to the server, instead of the one that ``url`` names.

    Raises:
        ClientError: the address is none, or another argument cannot be used. Only ``predict`` reaches the server.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls on their way fail."""
        self._caller.close()

    @property
    def description(self) -> ServedDescription:
        """What the server says about the model.

        Raises:
            ClientError: as ``predict``.
        """
        return self._caller.served(Call(self._timeout)).description

    def predict(
        self,
        items: Sequence[Any],
        *,
        windows: bool = False,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """Label, probabilities and rationale of each text or image, in the order of ``items``.

        Any number: they are sent in batches, texts of similar length together, several at a time.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.
            windows: read a text beyond the model's length window by window and combine the predictions
                (``batching.py`` has the rules), instead of cutting it (``Prediction.truncated``).
            deadline: seconds the whole call may take, with every request and pause; None: as long as it takes.
            request_id: what the server's log calls the first request; later batches have -2, -3 ... behind it.
                None: a random one.

        Raises:
            InputError: an empty list, or an argument that cannot be used.
            FaultyItemsError: items that cannot be used, by their number, counted from 1.
            ServerUnavailableError: nothing answers at the address; ServerBusyError: its queue is full.
            InsecureServerError: no trusted TLS connection.
            DeadlineError: no response in time.
            ModelMissingError: the server does not serve the model.
            VersionMismatchError: client and served model do not belong together.
            RejectedError: the server refused the request.
        """
        return self._caller.predict(Call(self._timeout, deadline, request_id), items, windows)


class AsyncClient(_ClientOptions):
    """``Client`` for asyncio: the same arguments, predictions and errors; up to ``CALLS`` calls are made at once.

    Each call is made in a thread, so the event loop is never held up. A cancelled task abandons its requests.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls on their way fail."""
        await asyncio.to_thread(self._caller.close)

    async def description(self) -> ServedDescription:
        """What the server says about the model; see ``Client.description``."""
        served = await self._in_thread(Call(self._timeout, cancellable=True), self._caller.served)
        return served.description

    async def predict(
        self,
        items: Sequence[Any],
        *,
        windows: bool = False,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """See ``Client.predict``."""
        call = Call(self._timeout, deadline, request_id, cancellable=True)
        return await self._in_thread(call, self._caller.predict, items, windows)

    async def _in_thread(self, call: Call, function: Callable[..., Result], *arguments: Any) -> Result:
        running = asyncio.wrap_future(self._threads.submit(function, call, *arguments))
        try:
            return await asyncio.wait_for(running, None if call.deadline is None else call.left + _GRACE)
        except TimeoutError:  # it still waits for a thread, or the thread for what cannot be cut short
            raise call.too_late() from None
        finally:
            call.cancel()
