"""The served model without a server: the same repository, the same graphs, the same answers. torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from rekd_deploy.batching import predict_batches
from rekd_deploy.engines.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.repository import GRAPH, check_repository, read_description
from rekd_deploy.signature import text_pair_signature
from rekd_deploy.triton_config import PREDICTOR, SELECTOR
from rekd_train.prediction import Prediction
from rekd_train.preprocess import EncodedTexts


class Pipeline:
    """Answers like the Triton client, in this process, on ONNX Runtime.

    Usable as a context manager; without ``with`` the graphs are loaded at the first use and stay until
    ``close``.

    Args:
        root: model repository written by rekd-export.
        batch_size: most texts computed at once.
        threads: threads inside one operation; None: the cores that this process may use.

    Raises:
        RepositoryError: a file is missing, altered, or does not belong to the others.
    """

    def __init__(self, root: str | Path, *, batch_size: int = 32, threads: int | None = None) -> None:
        root = Path(root)
        check_repository(root)
        self.description = read_description(root)
        self.labels = list(self.description.labels)
        self.preprocessor = self.description.preprocessor()
        self._batch_size = batch_size
        signature = text_pair_signature(self.description.capacity, len(self.labels))
        self._runners = [
            OnnxRuntimeRunner(root / model / "1" / GRAPH, graph, model, threads=threads)
            for model, graph in ((SELECTOR, signature.selector), (PREDICTOR, signature.predictor))
        ]
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

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Label, probabilities and rationale of each text, in their order.

        Raises:
            InputError: an empty list or a text that cannot be used, by its index; nothing is computed.
            EngineError: ONNX Runtime cannot load or run a graph.
            MissingExtraError: ONNX Runtime is not installed.
        """
        return predict_batches(self.preprocessor, texts, self._batch_size, self._answer)

    def _open(self) -> None:
        if self._running is None:
            with ExitStack() as stack:
                for runner in self._runners:
                    stack.enter_context(runner)
                self._running = stack.pop_all()

    def _answer(self, encoded: EncodedTexts) -> list[Prediction]:
        self._open()
        selector, predictor = self._runners
        chosen = selector.run(encoded.inputs)
        known = {**encoded.inputs, **chosen}
        answers = predictor.run({spec.name: known[spec.name] for spec in predictor.signature.inputs})
        return encoded.predictions(self.labels, answers["probabilities"], chosen["mask"], chosen["scores"])
