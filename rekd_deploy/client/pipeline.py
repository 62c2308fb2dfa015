"""The served model without a server: the same repository, the same graphs, the same predictions. torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Self

from rekd_deploy.client.batching import Batches
from rekd_deploy.contract.description import Artefacts
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.repository.reader import Exported
from rekd_deploy.runtimes.base import Chain, RunnerChain, parse_device
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded


class Pipeline:
    """Predicts like the Triton client, in this process, on ONNX Runtime or, if requested, the repository's engines.

    On a GPU, ONNX Runtime keeps what one step hands to the next where it is, and replays a captured CUDA graph for
    each bucket of batch and length; texts are parted so that few rows are filled up (``batching.cuts``). Without
    ``with`` the graphs are loaded at the first use and stay until ``close``.

    Args:
        source: model repository written by rekd-export, or artefacts as ``export`` returns them.
        batch_size: most texts or images computed at once.
        threads: threads inside one operation; None: the cores that this process may use.
        single_graph: run both steps as one graph, which the export must hold.
        engine: run the TensorRT engines, which the export must hold.
        device: 'cpu', 'cuda' or 'cuda:N'; None: 'cuda' for engines, else 'cpu'.

    Raises:
        EngineError: there is no such device, or engines were requested on a CPU.
        InputError: ``batch_size`` is below 1.
        RepositoryError: a file is missing, altered, or of another export; or there is no single graph or engine.
    """

    def __init__(
        self, source: str | Path | Artefacts, *, batch_size: int = 32, threads: int | None = None,
        single_graph: bool = False, engine: bool = False, device: str | None = None,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be at least 1")
        exported = Exported.of(source)
        self.description = exported.description
        self.preprocessor = self.description.preprocessor()
        self._batch_size = batch_size
        self._filled_to: list[int] = []
        roles = ("single",) if single_graph else ("selector", "predictor")
        if not set(roles) <= set(exported.graphs):
            raise RepositoryError(f"{exported.name} holds no single graph; fix: rekd-export CHECKPOINT --single-graph")
        kind, index = parse_device(device or ("cuda" if engine else "cpu"))
        self._chain: Chain
        if engine:
            if kind == "cpu":
                raise EngineError("TensorRT engines run on GPUs alone; fix: device 'cuda', or engine=False")
            self._chain = RunnerChain([exported.engine_runner(role, device=index) for role in roles])
            self._batch_size = min(batch_size, *map(exported.largest_batch, roles))
        elif kind == "cuda":
            self._chain = chain = exported.device_chain(roles, index=index)
            self._filled_to = chain.batches
            self._batch_size = min([batch_size, *chain.batches[-1:]])
        else:
            self._chain = RunnerChain([exported.graph_runner(role, threads=threads) for role in roles])
        self._is_open = False
        self._opening = Lock()
        self._closings = 0

    def __enter__(self) -> Self:
        self._open(self._closings)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the loaded graphs; calls of other threads fail, later ones load the graphs again."""
        with self._opening:
            self._closings += 1
            if self._is_open:
                self._is_open = False
                self._chain.__exit__(None, None, None)

    def predict(self, items: Sequence[Any], *, windows: bool = False) -> list[Prediction]:
        """Label, probabilities and rationale of each text or image, in their order.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.
            windows: read a text beyond the model's length window by window, instead of cutting it (``batching.py``).

        Raises:
            InputError: an empty list, or windows of an image.
            FaultyItemsError: items that cannot be used, by their number, counted from 1. Texts are all checked
                before any is computed; images are read a batch at a time.
            EngineError: a graph cannot be loaded or run, or another thread has closed the pipeline.
        """
        closings = self._closings
        batches = Batches(self.preprocessor, items, self._batch_size, windows=windows, filled_to=self._filled_to)
        for indices, encoded in batches:
            batches.collect(indices, self._predicted(encoded, closings))
        return batches.predictions()

    def _open(self, closings: int) -> None:
        with self._opening:
            if self._closings != closings:
                raise EngineError("the pipeline is closed; fix: close it once its calls are done")
            if not self._is_open:
                self._chain.__enter__()
                self._is_open = True

    def _predicted(self, encoded: Encoded, closings: int) -> list[Prediction]:
        self._open(closings)
        try:
            found = self._chain.run(encoded.inputs)
        except EngineError:
            self._open(closings)  # closed meanwhile is the reason
            raise
        return encoded.predictions(self.description.labels, found["probabilities"], found["mask"], found["scores"])
