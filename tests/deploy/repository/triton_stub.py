"""triton_python_backend_utils as far as the models inside Triton use it; and those models, run as Triton runs them."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
from google.protobuf.json_format import MessageToDict

from rekd_deploy.repository.config import PREDICTOR, SELECTOR, read_config

OUTPUTS = {SELECTOR: ["scores", "mask", "positions", "kept"], PREDICTOR: ["logits", "probabilities"]}
LOGGED = []
Logger = SimpleNamespace(log_warn=LOGGED.append)


MISREADS = int(np.__version__.partition(".")[0]) >= 2
"""Triton's stub was built for NumPy 1: what it reads by itself of NumPy 2's arrays is wrong, without an error."""


class Exporter:
    """What lies in a capsule, as ``numpy.from_dlpack`` takes it."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


class Tensor:
    def __init__(self, name, array):
        self.array, self.name = array if array.dtype == object or not MISREADS else np.zeros_like(array), lambda: name

    @classmethod
    def from_dlpack(cls, name, capsule):
        tensor = cls.__new__(cls)
        tensor.array, tensor.name, tensor.capsule = np.from_dlpack(Exporter(capsule)).copy(), lambda: name, capsule
        return tensor

    @classmethod
    def received(cls, name, array):
        tensor = cls.__new__(cls)
        tensor.array, tensor.name = array, lambda: name
        return tensor

    def as_numpy(self):
        return self.array if self.array.dtype == object or not MISREADS else np.zeros_like(self.array)

    def __dlpack__(self, **_):
        return np.array(self.array, order="C").__dlpack__()

    def __dlpack_device__(self):
        return 1, 0


class TritonError(Exception):
    INVALID_ARG, INTERNAL = 1, 2

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class Request:
    def __init__(self, arrays, outputs, name=""):
        self.arrays, self.requested_output_names, self.request_id = arrays, lambda: outputs, lambda: name

    def inputs(self):
        return [Tensor.received(name, array) for name, array in self.arrays.items()]


def get_input_tensor_by_name(request, name):
    return Tensor.received(name, request.arrays[name])


def get_output_tensor_by_name(response, name):
    return Tensor.received(name, response.outputs[name])


def InferenceResponse(output_tensors=(), error=None):
    return SimpleNamespace(outputs={tensor.name(): tensor.array for tensor in output_tensors}, error=error)


ASKED = {}
"""Models by name, which requests from inside a model find."""


class InferenceRequest:
    """Of a model to another; its response has methods where that of ``InferenceResponse`` is looked into."""

    def __init__(self, model_name, model_version, requested_output_names, inputs):
        assert model_version == 1
        self.model, self.names, self.arrays = model_name, requested_output_names, {x.name(): x.array for x in inputs}

    def exec(self):
        (found,) = ASKED[self.model].execute([Request(self.arrays, self.names)])
        error = found.error and SimpleNamespace(message=lambda: str(found.error))
        return SimpleNamespace(outputs=found.outputs, has_error=lambda: error is not None, error=lambda: error)


def initialised(folder, config: str, more):
    """The model.py of a model's folder, loaded and initialised with its configuration as JSON."""
    specification = importlib.util.spec_from_file_location(f"{folder.name}_model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_config": config, "model_repository": str(folder), "model_version": "1", **more})
    return model


def started(root, name, edit=lambda config: None, **more):
    """The same of a repository's model; needs the fixture ``inside_triton``."""
    message = read_config(root / name / "config.pbtxt")
    edit(message)
    return initialised(root / name, json.dumps(MessageToDict(message, preserving_proto_field_name=True)), more)


def watched(model):
    """The list of (rows, length) of every batch that the model's graph runs from now on."""
    graph, batches = model._graph, []
    def run(names, inputs):
        batches.append(next(iter(inputs.values())).shape[:2])
        return graph.run(names, inputs)
    model._graph = SimpleNamespace(run=run)
    return batches


def ask(model, name, *requests, outputs=None):
    return model.execute([Request(arrays, outputs or OUTPUTS[name]) for arrays in requests])
