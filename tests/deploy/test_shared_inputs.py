"""A region serves one request at a time, and nothing about memory becomes an answer or an error."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from rekd_deploy.client.shared_inputs import SharedInputs
from rekd_deploy.client.transport import Arrays, ModelConfig, RegionInput, Transport
from rekd_deploy.errors import DeadlineError, ModelMissingError, RejectedError, ServerUnavailableError

INPUTS = {"ids": np.arange(6, dtype=np.int64).reshape(1, 6), "mask": np.ones((1, 6), dtype=np.int64)}


class Wire(Transport):
    """Holds every request; a test answers them."""

    def __init__(self):
        self.registered, self.requests, self.refusal = [], [], None

    def model_versions(self, model, timeout):
        return ["1"]

    def model_config(self, model, version, timeout):
        return ModelConfig({}, 1)

    def submit(self, model, inputs, outputs, *, timeout=None, request_id=""):
        self.requests.append((inputs, Future()))
        return self.requests[-1][1]

    def register_region(self, name, key, size, timeout):
        if self.refusal:
            raise self.refusal
        self.registered.append(name)

    def unregister_region(self, name, timeout):
        self.registered = [each for each in self.registered if each != name]

    def close(self):
        pass

    @property
    def ways(self):
        """Region of each request; None: over the wire."""
        return [
            inputs["ids"].region if isinstance(inputs["ids"], RegionInput) else None for inputs, _ in self.requests
        ]


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def transport(wire):
    transport = SharedInputs(wire, 5.0)
    yield transport
    transport.close()
    assert wire.registered == [] and not list(Path("/dev/shm").glob("rekd_client_*"))


def submit(transport):
    return transport.submit("rekd", INPUTS, ("mask",))


def test_one_region_one_request_and_again_after_its_answer(wire, transport):
    submit(transport), submit(transport)
    assert len(set(wire.ways)) == 2 and None not in wire.ways
    wire.requests[0][1].set_result(Arrays(x=1))
    submit(transport)
    assert wire.ways[2] == wire.ways[0]


def test_inputs_lie_in_the_region(wire, transport):
    submit(transport)
    placed = wire.requests[0][0]
    content = (Path("/dev/shm") / placed["ids"].region).read_bytes()
    for name, given in placed.items():
        assert content[given.offset : given.offset + given.array.nbytes] == INPUTS[name].tobytes()


def test_what_was_abandoned_is_never_written_again(wire, transport):
    assert submit(transport).cancel()
    assert wire.requests[0][1].cancelled(), "the server is told"
    submit(transport)
    assert wire.ways[1] not in (None, wire.ways[0])


@pytest.mark.parametrize("error", [DeadlineError("late"), ServerUnavailableError("gone")])
def test_other_failures_stay_what_they_are_and_the_region_rests(wire, transport, error):
    future = submit(transport)
    wire.requests[0][1].set_exception(error)
    with pytest.raises(type(error)):
        future.result(1)
    submit(transport)
    assert wire.ways[1] not in (None, wire.ways[0])


@pytest.mark.parametrize("error", [RejectedError("no"), ModelMissingError("Unable to find shared memory region")])
def test_a_refusal_is_asked_again_over_the_wire(wire, transport, error):
    future = submit(transport)
    wire.requests[0][1].set_exception(error)
    assert wire.ways[1] is None and not future.done()
    wire.requests[1][1].set_result(Arrays(x=2))
    assert future.result(1) == {"x": 2}
    submit(transport)
    assert wire.ways[2] is None, "a region that never worked: not again for a while"


def test_a_refusal_over_the_wire_is_the_answer(wire, transport):
    future = submit(transport)
    for number in range(2):
        wire.requests[number][1].set_exception(RejectedError("really"))
    with pytest.raises(RejectedError, match="really"):
        future.result(1)


def test_cancelled_while_asked_again(wire, transport):
    future = submit(transport)
    wire.requests[0][1].set_exception(RejectedError("no"))
    assert future.cancel() and wire.requests[1][1].cancelled()


def test_a_server_that_maps_nothing_is_left_in_peace_and_tried_again(wire, transport):
    wire.refusal = ServerUnavailableError("no shared memory here")
    submit(transport)
    wire.refusal = None
    submit(transport)
    assert wire.ways == [None, None]
    transport._not_before = 0.0  # the minute is over
    submit(transport)
    assert wire.ways[2] is not None
