"""How Triton batches, places and warms up the models of a pair: what all flavours of a repository have in common."""

from __future__ import annotations

from dataclasses import dataclass

from rekd_train.errors import ConfigError


@dataclass(frozen=True)
class ServingSettings:
    """How the server runs the component models."""

    max_batch_size: int = 64
    """Most items in one request and in one dynamic batch."""
    preferred_batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Batch sizes the scheduler aims at; those above max_batch_size are left out."""
    queue_delay_us: int = 0
    """Microseconds a request may wait for others to form a preferred batch."""
    instances: int = 1
    """Processes of each component model."""
    threads: int = 0
    """Threads of each process inside one operation; 0: the instances share the cores."""
    gpu: bool = False
    """Whether ONNX Runtime runs on GPUs; engines always do."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to run on, each with all instances; empty: every one that is there."""
    rate_limit: bool = False
    """Whether each execution takes one of the server's resource 'rekd'."""
    warm_up: bool = True
    """Whether every padded length (on GPUs every batch size, too) has run before a model calls itself ready."""

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "queue_delay_us": 0, "instances": 1, "threads": 0}
        mistakes = [
            f"{name} is {getattr(self, name)}; it must be at least {limit}"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        if len(set(self.gpus)) != len(self.gpus) or any(number < 0 for number in self.gpus):
            mistakes.append(f"gpus {self.gpus} must be 0 or more, each once")
        if any(size < 1 for size in self.preferred_batch_sizes):
            mistakes.append(f"preferred_batch_sizes {self.preferred_batch_sizes} must all be at least 1")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def preferred(self) -> list[int]:
        """The batch sizes that the scheduler aims at."""
        return [size for size in self.preferred_batch_sizes if size <= self.max_batch_size]
