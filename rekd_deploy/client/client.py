"""Predictions from a Triton server: texts or images in, ``Prediction`` out. torch-free.

    with Client("localhost:8001") as client:
        client.predict(["A film of great warmth."])

    async with AsyncClient("localhost:8001") as client:
        await client.predict(["A film of great warmth."])

``Client`` makes a call in the caller's thread, ``AsyncClient`` in a thread of its own, so both predict the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Self, TypeVar

from rekd_deploy.client.batching import Batches
from rekd_deploy.client.calls import GRACE, Call, Predictions, Sent, ServedModel, ServedVersion
from rekd_deploy.client.connection import RetryPolicy, TlsSettings
from rekd_deploy.client.transport import Arrays, Transport, open_transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ClientError, ModelMissingError, VersionMismatchError
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_train.inputs.text import EncodedTexts, TextPreprocessor

CALLS = 64
"""Calls of one AsyncClient that are made at once, each in a thread; more wait their turn."""
IN_FLIGHT = 4
"""Requests of one call on their way at once: enough to keep the server's batcher busy while responses are read."""
_OUTPUTS = ("scores", "mask", "probabilities")
_READINGS = 3
"""How often a call starts anew because the server has another model since."""
_LONE_SECONDS = 30.0
"""How long the model for lone texts is not asked again where it was not served."""
Result = TypeVar("Result")


class _OtherModel(Exception):
    """The response is of another model than the request was prepared for."""


class _Caller:
    """What both clients take, hold and do in a call."""

    def __init__(
        self, url: str = "localhost:8001", *, model: str = ENSEMBLE, timeout: float = 30.0,
        preprocessing: str | None = None, retry: RetryPolicy | None = None, headers: Mapping[str, str] | None = None,
        tls: TlsSettings | None = None, transport: Transport | None = None, version: str = "",
        lone: str | None = SINGLE,
    ) -> None:  # fmt: skip
        if not timeout > 0:
            raise ClientError(f"timeout is {timeout:g} s; it must be more than 0")
        if version and not version.isdecimal():
            raise ClientError(f"version is '{version}'; give a number such as '1', or '' for the newest")
        self.url = url
        self.model = model
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._transport = transport or open_transport(url, timeout, headers=headers, tls=tls)
        self._model = ServedModel(url, model, self._transport, preprocessing, version)
        self._lone = self._model  # whom a lone text is sent to
        self._lone_from = 0.0  # by time.monotonic; until then the ensemble is asked
        if lone is not None and model == ENSEMBLE:
            self._lone = ServedModel(url, lone, self._transport, preprocessing, version)
            self._lone.beside, self._model.beside = self._model, self._lone
        self._threads = ThreadPoolExecutor(CALLS, "rekd-client")  # AsyncClient's; none starts before it is used
        self._closed = False

    def _close(self) -> None:
        self._closed = True
        self._transport.close()

    def _served(self, call: Call, model: ServedModel | None = None, version: str = "") -> ServedVersion:
        """What the server says about a version of a model; empty: the newest. Read once."""
        return self._retried(call, lambda _: (model or self._model).version(version, call))

    def _predictions(self, call: Call, items: Sequence[Any], windows: bool) -> Predictions:
        alone = not windows and isinstance(items, Sized) and len(items) == 1 and time.monotonic() >= self._lone_from
        for _ in range(_READINGS):
            model = self._lone if alone else self._model
            try:
                return self._exchange(call, model, self._served(call, model), items, windows)
            except _OtherModel:
                continue
            except ModelMissingError:
                if model is self._model:
                    raise
                alone = False  # it is not served, or not while the server ends
                self._lone_from = time.monotonic() + _LONE_SECONDS
        raise VersionMismatchError(
            f"the server at {self.url} changed the model '{self.model}' {_READINGS} times during one call; "
            "fix: call again once it serves one version"
        )

    def _exchange(
        self, call: Call, model: ServedModel, served: ServedVersion, items: Sequence[Any], windows: bool
    ) -> Predictions:
        """Send every batch, a few at a time, and read the responses."""
        batches = Batches(served.preprocessor, items, served.max_batch_size, windows=windows)
        coming = iter(batches)
        first = list(islice(coming, 2))
        wait = len(first) == 1 and not call.cancellable
        in_flight: deque[Sent] = deque()
        answered = served.version

        def send(sent: Sent, wait: bool = False) -> None:
            timeout = call.remaining()
            sent.until = time.monotonic() + timeout
            sent.future = self._transport.submit(
                model.name, sent.encoded.inputs, _OUTPUTS, timeout=timeout, request_id=sent.request_id,
                version=model.wanted, wait=wait,
            )

        def response(attempt: int) -> Arrays:
            if attempt > 1:
                send(in_flight[0])
            return call.result(in_flight[0])

        def take() -> None:
            nonlocal answered
            outputs = self._retried(call, response)
            sent = in_flight.popleft()
            if outputs.version not in ("", served.version):  # tokens and labels must still be those of the request
                newest = model.newest = self._served(call, model, outputs.version)
                if not newest.description.reads_as(served.description):
                    raise _OtherModel
                if isinstance(newest.preprocessor, TextPreprocessor) and isinstance(sent.encoded, EncodedTexts):
                    # it may have learnt from other texts
                    doubts = newest.preprocessor.doubts(sent.encoded.inputs)
                    sent.encoded = replace(sent.encoded, doubts=doubts)
            answered = outputs.version or answered
            batches.collect(sent.indices, model.predictions(served, sent, outputs, windows))

        try:
            for indices, encoded in chain(first, coming):
                in_flight.append(Sent(indices, encoded, call.next_id()))
                send(in_flight[-1], wait)
                if len(in_flight) == IN_FLIGHT:
                    take()
            while in_flight:
                take()
        finally:
            for sent in in_flight:
                sent.future.cancel()
        predictions = Predictions(batches.predictions())
        predictions.version = answered
        return predictions

    def _retried(self, call: Call, function: Callable[[int], Result]) -> Result:
        """What the function of an attempt's number gives; it is called again after an error that may pass."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return function(attempt)
            except ClientError as error:
                if self._closed:
                    raise ClientError("the client is closed; fix: close it once its calls are done") from None
                pause = self._retry.pause(error, attempt, call.left)
                if pause is None:
                    raise
            call.pause(pause)


class Client(_Caller):
    """Predictions of a Triton server's ensemble; labels and preprocessing come from the server.

    Safe to use from several threads, which share its connections. Use it as a context manager, or call ``close()``.

    Args:
        url: HOST:PORT (or grpc://HOST:PORT) for gRPC, http://HOST:PORT for HTTP; with TLS grpcs:// and https://.
        model: name of the ensemble, of the single graph (rekd_single) where it is served, or of an export beside.
        timeout: seconds one request may take.
        preprocessing: fingerprint (``Preprocessor.fingerprint``) that the served model must have; None: any.
        retry: when a request is sent again that found no server, or its queue full; None: ``RetryPolicy()``.
        headers: sent with every request, such as {"authorization": "Bearer ..."}.
        tls: which server to trust and who the client is, for grpcs:// and https://.
        transport: what speaks to the server, instead of the one that ``url`` names.
        version: the version of the model that is asked; empty: the newest.
        lone: model that a call with one text or image asks in place of the ensemble, if it is served: it answers the
            same, sooner. None: the ensemble is asked in any case.

    Raises:
        ClientError: the address is none, or another argument cannot be used. Only ``predict`` reaches the server.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls on their way fail."""
        self._close()

    @property
    def description(self) -> ServedDescription:
        """What the server says about the model; errors as of ``predict``."""
        return self._served(Call(self._timeout)).description

    def predict(
        self, items: Sequence[Any], *,
        windows: bool = False, deadline: float | None = None, request_id: str | None = None,
    ) -> Predictions:
        """Label, probabilities and rationale of each text or image, in the order of ``items``; and ``version``.

        Any number: they are sent in batches, texts of similar length together, several at a time.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.
            windows: read a text beyond the model's length window by window and combine the predictions
                (``batching.py`` has the rules), instead of cutting it (``Prediction.truncated``).
            deadline: seconds the whole call may take, with every request and pause; None: as long as it takes.
            request_id: what the server's log calls the first request, later ones with -2, -3 ...; None: a random one.

        Raises:
            InputError: an empty list, or an argument that cannot be used.
            FaultyItemsError: items that cannot be used, by their number, counted from 1.
            ClientError: of the kind that fits; ``rekd_deploy/errors.py`` lists them.
        """
        return self._predictions(Call(self._timeout, deadline, request_id), items, windows)


class AsyncClient(_Caller):
    """``Client`` for asyncio: the same arguments, predictions and errors; up to ``CALLS`` calls are made at once.

    Each call is made in a thread, so the event loop is never held up. A cancelled task abandons its requests.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls on their way fail."""
        await asyncio.to_thread(self._close)

    async def description(self) -> ServedDescription:
        """What the server says about the model; see ``Client.description``."""
        return (await self._in_thread(self._served, Call(self._timeout, cancellable=True))).description

    async def predict(
        self, items: Sequence[Any], *,
        windows: bool = False, deadline: float | None = None, request_id: str | None = None,
    ) -> Predictions:
        """See ``Client.predict``."""
        call = Call(self._timeout, deadline, request_id, cancellable=True)
        return await self._in_thread(self._predictions, call, items, windows)

    async def _in_thread(self, function: Callable[..., Result], call: Call, *arguments: Any) -> Result:
        running = asyncio.wrap_future(self._threads.submit(function, call, *arguments))
        try:
            return await asyncio.wait_for(running, None if call.deadline is None else call.left + GRACE)
        except TimeoutError:  # it still waits for a thread, or the thread for what cannot be cut short
            raise call.too_late() from None
        finally:
            call.cancel()
