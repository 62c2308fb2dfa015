"""What may be chosen about an export, checked where it enters. torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rekd_deploy.contract.parity_report import GPU_PRECISIONS, RUNTIME_PRECISIONS, Precision
from rekd_deploy.errors import EngineError
from rekd_deploy.export.checkpoint import CheckpointFacts, machine
from rekd_deploy.export.engines import EngineRequest
from rekd_deploy.repository.config import ENGINES, TARGETS, ServingSettings
from rekd_deploy.runtimes.base import parse_device
from rekd_train.errors import ConfigError

GPU_QUEUE_DELAY = 100
"""Microseconds: there a batch costs hardly more than one text; on a CPU waiting only adds to the latency."""
_LONGEST_DELAY = 1_000_000
"""Microseconds; above this a request would rather be refused than wait."""
_LARGEST_BATCH = 4096
"""Above this a number of rows is a slip of the keyboard."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported and served.

    Raises:
        ConfigError: a value is out of range, whatever the checkpoint; every mistake in one message.
    """

    target: str = "python"
    """Which Triton backend runs the graphs."""
    engine: str | None = None
    """What the target 'python' runs instead of ONNX Runtime: 'tensorrt-rtx'; None: nothing else."""
    gpu: bool | None = None
    """Whether ONNX Runtime runs on GPUs; None: the target 'onnxruntime' if this machine has one. Engines always do."""
    lengths: tuple[int, ...] = ()
    """Tokens that texts are padded to (the smallest that fits, or the model's limit); empty: the checkpoint's."""
    batches: tuple[int, ...] = ()
    """Batch sizes the scheduler aims at, the largest the most in one request; empty: the usual ones."""
    instances: int | None = None
    """Processes (GPU instances) of each component model; None: two on CPUs with several cores, else one."""
    threads: int = 0
    """Threads of each inside one operation; 0: the instances share the cores, and none has more than half of them."""
    queue_delay: int | None = None
    """Microseconds that a request may wait for others to form a preferred batch; None: 100 on GPUs, else 0."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to run on; empty: every one that is there."""
    rate_limit: bool = False
    """Each execution takes one of the server's resource 'rekd'."""
    single_graph: bool | None = None
    """Add a model that holds both steps in one graph; None: without engines, or if the repository there has it."""
    fused: bool = True
    """Graphs for ONNX Runtime alone, and faster there."""
    text_endpoint: bool | None = None
    """Add the model rekd_text (rekd_image), which takes raw texts (JPEG or PNG files); None: with the target
    'python', whose server has all that it needs, or if the repository there has it."""
    precision: Precision | None = None
    """What the graphs compute in; the decision and both heads stay fp32. None: ``usual_precision``."""
    keep: int = 1
    """Versions that stay in the repository, the new one included."""
    parity_texts: Path | None = None
    """.jsonl or .txt with real texts for the parity gate; None: the checkpoint's own examples."""
    device: str | None = None
    """Where the gate runs the graphs: 'cpu', 'cuda' or 'cuda:N'; None: see ``gate_device``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))
        if mistakes := self._mistakes():
            raise ConfigError("; ".join(mistakes))

    def _mistakes(self) -> list[str]:
        mistakes = []
        if self.target not in TARGETS:
            mistakes.append(f"target '{self.target}' is not one of {', '.join(TARGETS)}")
        elif self.engine is not None and self.engine not in ENGINES[self.target]:
            fix = "--target python --engine tensorrt-rtx, or --target tensorrt"
            mistakes.append(f"target '{self.target}' cannot run the engine '{self.engine}'; fix: {fix}")
        if self.gpu is not None and self.product is not None:
            fix = "leave out --gpu and --cpu, or the engines"
            mistakes.append(f"{self.product} engines need a GPU in any case; fix: {fix}")
        possible = GPU_PRECISIONS if self.on_gpu else RUNTIME_PRECISIONS
        possible = possible if self.product is None else get_args(Precision)
        if self.precision is not None and self.precision not in possible:
            runtime = (self.product or "ONNX Runtime") + " can do" + (" on GPUs" if self.on_gpu else "")
            fix = f"one of {', '.join(possible)}"
            mistakes.append(f"precision '{self.precision}' is none that {runtime}; fix: {fix}")
        if self.queue_delay is not None and not 0 <= self.queue_delay <= _LONGEST_DELAY:
            fix = "about the time that one batch takes, or leave it out"
            mistakes.append(f"queue delay {self.queue_delay} is outside 0..{_LONGEST_DELAY} microseconds; fix: {fix}")
        mistakes += [f"length {length} must be at least 1" for length in self.lengths if length < 1]
        wrong = [size for size in self.batches if not 1 <= size <= _LARGEST_BATCH]
        mistakes += [f"batch {size} is outside 1..{_LARGEST_BATCH}" for size in wrong]
        if self.gpus and self.product is None and not self.on_gpu:
            mistakes.append(f"gpus {_listed(self.gpus)} are for GPUs, but the models run on CPUs; fix: add --gpu")
        try:
            ServingSettings(instances=self._instances, threads=self.threads, gpus=self.gpus)
        except ConfigError as error:
            mistakes.append(str(error))
        try:
            kind, _ = parse_device(self.device or "cpu")
        except EngineError as error:
            mistakes.append(str(error))
        else:
            precision = self.precision or self.usual_precision
            if kind == "cuda" and precision in RUNTIME_PRECISIONS and precision not in GPU_PRECISIONS:
                why = f"ONNX Runtime has no {precision} kernels for GPUs"
                mistakes.append(f"{why}, so the gate cannot run there; fix: --device cpu")
        if self.keep < 1:
            mistakes.append(f"keep is {self.keep}; at least the new version stays (1)")
        return mistakes

    @property
    def product(self) -> str | None:
        """The product whose engines are built; None: the graphs are served as they are."""
        return "tensorrt" if self.target == "tensorrt" else self.engine

    @property
    def on_gpu(self) -> bool:
        """Whether ONNX Runtime runs on GPUs."""
        if self.gpu is None and self.target == "onnxruntime":
            return machine()["gpus"] > 0
        return bool(self.gpu) and self.product is None

    @property
    def usual_precision(self) -> Precision:
        """Where none was chosen: fp16 where ONNX Runtime runs on GPUs, which have units of their own for it."""
        return "fp16" if self.on_gpu else "fp32"

    @property
    def _instances(self) -> int:
        if self.instances is not None:
            return self.instances
        # two: one computes while Triton sends the answers of the other
        return 1 if self.product is not None or self.on_gpu or machine()["cores"] < 2 else 2

    @property
    def fuse(self) -> bool:
        """Whether the graphs are fused: what engines are built from never is."""
        return self.fused and self.product is None

    @property
    def engines(self) -> EngineRequest:
        """How engines are built."""
        return EngineRequest(self.serving.max_batch_size, self.batches or None, self.lengths or None)

    @property
    def serving(self) -> ServingSettings:
        """How the server batches."""
        gpu, threads = self.on_gpu, self.threads
        usual = GPU_QUEUE_DELAY if gpu or self.product is not None else 0
        if self.target == "onnxruntime" and not gpu and threads == 0:  # its own 0 is a thread a core in every instance
            threads = max(1, machine()["cores"] // max(2, self._instances))
        settings = ServingSettings(
            gpu=gpu, instances=self._instances, threads=threads, gpus=self.gpus, rate_limit=self.rate_limit,
            queue_delay_us=usual if self.queue_delay is None else self.queue_delay,
        )
        if not self.batches:
            return settings
        # a batch of one is formed anyway; as a preferred size it would end the waiting for others
        preferred = tuple(size for size in self.batches if size > 1)
        return replace(settings, max_batch_size=self.batches[-1], preferred_batch_sizes=preferred)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sizes that batches are formed in, ascending; the last is the most."""
        serving = self.serving
        return tuple(sorted({*serving.preferred_batch_sizes, serving.max_batch_size}))

    def check(self, facts: CheckpointFacts) -> None:
        """Check the choices against a checkpoint.

        Raises:
            ConfigError: names each value, its limits and the fix.
        """
        mistakes, lengths, longest = [], _listed(self.lengths), facts.preprocessor.positions
        if facts.kind == "image" and self.parity_texts is not None:
            fix = "leave out --parity-texts"
            mistakes.append(f"{self.parity_texts} holds texts, but the checkpoint reads images; fix: {fix}")
        why = ""
        if facts.kind == "image":
            why = "it reads images, which all have one size"
        elif facts.policy.selectable == "all":
            why = f"its rationale may hold padding, so every text must have all {longest} positions"
        if self.lengths and why:
            mistakes.append(f"lengths {lengths} are not for {facts.directory}: {why}; fix: leave out --lengths")
        fix = f"fix: at least {facts.shortest_length}, at most {longest}"
        for length in self.lengths if not mistakes else ():
            if length > longest:
                mistakes.append(f"length {length} is above the {longest} positions that the model reads; {fix}")
            elif length < facts.shortest_length:
                budget = f"smaller than the budget: a rationale may hold K = {facts.capacity} tokens"
                mistakes.append(f"length {length} is {budget}; {fix}")
        if mistakes:
            raise ConfigError("; ".join(mistakes))


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
