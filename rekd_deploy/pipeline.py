"""The served model without a server: the same repository, the same graphs, the same answers. torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rekd_deploy.batching import predict_batches
from rekd_deploy.engines.base import Chain, RunnerChain, parse_device
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.repository_check import check_repository, read_description
from rekd_deploy.repository_runners import device_chain, engine_runner, graph_runner, largest_batch
from rekd_train.prediction import Prediction
from rekd_train.preprocessors import Encoded


class Pipeline:
    """Answers like the Triton client, in this process, on ONNX Runtime or, where asked for, the repository's engines.

    On a GPU, ONNX Runtime keeps what one step hands to the next where it is, and replays a captured CUDA graph for
    each bucket of batch and length.

    Usable as a context manager; without ``with`` the graphs are loaded at the first use and stay until
    ``close``.

    Args:
        root: model repository written by rekd-export.
        batch_size: most texts or images computed at once.
        threads: threads inside one operation; None: the cores that this process may use.
        single_graph: run both steps as one graph, which the repository must hold.
        engine: run the TensorRT engines, which the repository must hold.
        device: 'cpu', 'cuda' or 'cuda:N'; None: 'cuda' for engines, else 'cpu'.

    Raises:
        EngineError: there is no such device, or engines were asked for on a CPU.
        RepositoryError: a file is missing, altered, or does not belong to the others; or there is no single graph or
            engine.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 32,
        threads: int | None = None,
        single_graph: bool = False,
        engine: bool = False,
        device: str | None = None,
    ) -> None:
        root = Path(root)
        manifest = check_repository(root)
        self.description = read_description(root)
        self.labels = list(self.description.labels)
        self.preprocessor = self.description.preprocessor()
        self._batch_size = batch_size
        roles = ("single",) if single_graph else ("selector", "predictor")
        if not set(roles) <= set(manifest["artefacts"]):
            raise RepositoryError(f"{root} holds no single graph; fix: rekd-export CHECKPOINT --single-graph")
        kind, index = parse_device(device or ("cuda" if engine else "cpu"))
        self._chain: Chain
        if engine and kind == "cpu":
            raise EngineError("TensorRT engines run on GPUs alone; fix: device 'cuda', or engine=False")
        if engine:
            self._chain = RunnerChain([engine_runner(root, manifest, role, device=index) for role in roles])
            self._batch_size = min(batch_size, *(largest_batch(root, manifest, role) for role in roles))
        elif kind == "cuda":
            self._chain = device_chain(root, manifest, roles, index=index)
            self._batch_size = min(batch_size, self._chain.largest_batch or batch_size)
        else:
            self._chain = RunnerChain([graph_runner(root, manifest, role, threads=threads) for role in roles])
        self._running: ExitStack | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the loaded graphs."""
        if self._running is not None:
            running, self._running = self._running, None
            running.close()

    def predict(self, items: Sequence[Any], *, windows: bool = False) -> list[Prediction]:
        """Label, probabilities and rationale of each text or image, in their order.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.
            windows: read a text beyond the model's length window by window and combine the answers
                (``windows.py`` has the rules), instead of cutting it.

        Raises:
            InputError: an empty list, an item that cannot be used, by its index, or windows of an image. Texts are
                all checked before any is computed.
            EngineError: ONNX Runtime or TensorRT cannot load or run a graph.
            MissingExtraError: the library is not installed.
        """
        return predict_batches(self.preprocessor, items, self._batch_size, self._answer, windows=windows)

    def _open(self) -> None:
        if self._running is None:
            with ExitStack() as stack:
                stack.enter_context(self._chain)
                self._running = stack.pop_all()

    def _answer(self, encoded: Encoded) -> list[Prediction]:
        self._open()
        found = self._chain.run(encoded.inputs)
        return encoded.predictions(self.labels, found["probabilities"], found["mask"], found["scores"])
