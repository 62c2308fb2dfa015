"""A stand-in for the server: responds by rule, one request after the other, and fails on demand."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rekd_deploy.client.client import IN_FLIGHT
from rekd_deploy.client.connection import Address
from rekd_deploy.client.transport import Arrays, Transport


class FakeServer(Transport):
    """Keeps the first word of each text; the probability of 'positive' is the text's share of the longest sequence."""

    _told = _is_ready = None  # never asked

    def __init__(self, parameters):
        super().__init__(Address.parse("127.0.0.1:1"), 30.0, {})
        self._workers, self._lock, self._numbers = ThreadPoolExecutor(1), threading.Lock(), {}
        self.configs, self.config_reads = {"1": parameters}, 0
        self.shapes, self.ids, self.timeouts, self.threads = [], [], [], set()
        self.open = self.begun = self.most_open = 0
        self.gate, self.opens_when_full = threading.Event(), False
        self.gate.set()
        self.fail_at, self.fail_config, self.change, self.closed = {}, [], lambda outputs: outputs, False

    @property
    def version(self):
        return max(self.configs, key=int)

    def model_versions(self, model, timeout):
        if self.fail_config:
            raise self.fail_config.pop()
        return list(self.configs)

    def model_config(self, model, version, timeout):
        self.config_reads += 1
        return self.configs[version], 4

    def submit(self, model, inputs, outputs, *, timeout=None, request_id="", wait=False):
        with self._lock:
            self._numbers[id(inputs)] = len(self.ids)
            self.shapes.append(inputs["input_ids"].shape)
            self.ids.append(request_id)
            self.timeouts.append(timeout)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            if self.opens_when_full and self.open >= IN_FLIGHT:  # as many as a call may have on their way
                self.gate.set()
        return super().submit(model, inputs, outputs, timeout=timeout, request_id=request_id, wait=wait)

    def infer(self, request):
        self.begun += 1
        self.threads.add(threading.current_thread())
        self.gate.wait(5)
        with self._lock:
            self.open -= 1
        if failure := self.fail_at.get(self._numbers[id(request.inputs)]):
            raise failure
        ids, share = request.inputs["input_ids"], request.inputs["attention_mask"].sum(axis=1) / 48
        mask = np.arange(ids.shape[1])[None, :] == np.ones(len(ids), dtype=int)[:, None]
        probabilities = np.stack([1 - share, share], axis=1).astype(np.float32)
        arrays = self.change({"scores": ids.astype(np.float32), "mask": mask, "probabilities": probabilities})
        outputs = Arrays({name: array for name, array in arrays.items() if name in request.outputs})
        outputs.version = self.version
        return outputs

    def close(self):
        self.closed = True
        super().close()
