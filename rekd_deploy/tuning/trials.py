"""Variants of one repository, each on a server of its own, loaded in turns, every answer compared. torch-free.

They are served at the same time, so that a machine that slows down slows all of them. Requests are tensors of one item
each, made beforehand; lengths of texts lie evenly between the shortest and the longest on a logarithmic scale.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rekd_deploy.bench.serving import read_totals, steps_between
from rekd_deploy.bench.timing import Load, closed_loop, merged
from rekd_deploy.client.transport import Request, open_transport
from rekd_deploy.repository.config import CONFIG_FILE, MANIFEST, SINGLE, THREADS, config_text, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.server.server import TritonServer
from rekd_train.files import sha256, write_json, write_text
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Ask = Callable[[int], Any]
"""Sends the request of a number, and gives its answer."""
OUTPUTS = ("mask", "probabilities")
_COUNT = 509
"""A prime number of requests, so that clients in step do not ask the same."""
_TIMEOUT = 30.0
"""Seconds."""
_TOLERANCE = 1e-4


class Trials:
    """Servers on repositories, and how to ask them; a context manager that stops them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._asked: dict[str, _Asked] = {}

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="rekd-trials-")))
        """For repositories; removed at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def serve(self, repository: Path) -> str:
        """Start a server and give its address, gRPC; ServerError: it cannot run it."""
        log = self.folder / f"{repository.name}.log"
        return self._stack.enter_context(TritonServer(repository, 0, 0, 0, log_file=log)).grpc_url

    def add(self, name: str, url: str, model: str, requests: Sequence[Mapping[str, np.ndarray]]) -> None:
        """A variant that asks a model at an address with tensors; each is asked alone first, to compare with."""
        transport = open_transport(url, _TIMEOUT)
        self._stack.callback(transport.close)

        def ask(number: int) -> Any:
            return transport.infer(Request(model, _TIMEOUT, requests[number], OUTPUTS))

        self.add_asking(name, url, ask, len(requests))

    def add_asking(self, name: str, url: str, ask: Ask, count: int) -> None:
        """A variant with ``count`` requests, whose answers are arrays of numbers or bytes by name."""
        self._asked[name] = _Asked(url, ask, count)

    def measured(
        self, clients: Sequence[int], rounds: int, seconds: float, report: Callable[[dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        """A cell for each number of clients and variant: ``Load.figures``, and what was compared.

        Each client has one request on its way. ``report`` is called with each cell.
        """
        cells, asked = [], self._asked
        for count in clients:
            loads: dict[str, list[Load]] = {name: [] for name in asked}
            steps: dict[str, dict[str, dict[str, Any]]] = {}  # of the last turn
            for turn in range(rounds):
                for name in list(asked) if turn % 2 == 0 else reversed(asked):
                    before = read_totals(asked[name].url)
                    loads[name].append(closed_loop(asked[name], concurrency=count, seconds=seconds, warmup_seconds=0.5))
                    asked[name].judge()
                    steps[name] = steps_between(before, read_totals(asked[name].url))
            for name, each in asked.items():
                cells.append({
                    "variant": name, "clients": count, **merged(loads[name]).figures(),
                    "per_second_by_turn": [load.per_second for load in loads[name]],
                    "rows_per_execution": {model: step["rows_per_batch"] for model, step in steps[name].items()},
                    "answers_compared": dict(each.judged),
                })
                each.judged.clear()
                report(cells[-1])
        return cells

    def differing(self, name: str, other: str) -> int:
        """How many answers, each asked alone, differ between two variants with the same requests."""
        return sum(not _same(*pair) for pair in zip(self._asked[name].alone, self._asked[other].alone, strict=True))


class _Asked:
    """A variant: each answer is compared with that of the same request alone, asked beforehand."""

    def __init__(self, url: str, ask: Ask, count: int) -> None:
        self.url, self.judged, self._ask = url, Counter[str](), ask
        self._given: list[tuple[int, Any]] = []
        self.alone = [ask(number) for number in range(count)]

    def __call__(self, number: int) -> None:
        place = number % len(self.alone)
        self._given.append((place, self._ask(place)))

    def judge(self) -> None:
        """Compare what came since the last time; under load it would take a sixth of the clients' time."""
        for place, answer in self._given:
            self.judged["equal" if _same(answer, self.alone[place]) else "different"] += 1
        self._given.clear()


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Numbers may differ by what neighbours in a batch change in the last digits; all else is equal."""
    return all(
        np.allclose(one[name], other[name], rtol=0, atol=_TOLERANCE) if one[name].dtype == np.float32
        else np.array_equal(one[name], other[name])
        for name in other
    )  # fmt: skip


def changed(
    source: Path, target: Path, edit: Callable[[ModelConfig], object], code: str = "", models: Sequence[str] = ()
) -> Path:
    """A copy of a repository whose models run otherwise.

    Args:
        edit: changes the configuration of a model that runs graphs.
        code: what is written behind their code.
        models: which of them; empty: all.
    """
    shutil.copytree(source, target)
    for path in target.glob(f"*/{CONFIG_FILE}"):
        config = read_config(path)
        if THREADS not in config.parameters or (models and config.name not in models):
            continue
        edit(config)
        write_text(path, config_text(config))
        if code:
            file = next(path.parent.glob("*/model.py"))
            write_text(file, f"{file.read_text(encoding='utf-8')}\n\n{code}\n")
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    files = manifest["repository"]["files"]
    manifest["repository"]["files"] = {name: sha256(target / name) for name in files}
    write_json(target / MANIFEST, manifest)
    check_repository(target)
    return target


def shares(threads: int, instances: int) -> Callable[[ModelConfig], None]:
    """An ``edit`` of ``changed``: so many threads, 0: a share of the cores, and so many instances."""

    def edit(config: ModelConfig) -> None:
        config.parameters[THREADS].string_value = str(threads)
        config.instance_group[0].count = instances

    return edit


def lone_model(repository: Path) -> str:
    """The model that our clients ask with a lone text or image."""
    return SINGLE if (repository / SINGLE).is_dir() else "rekd"


def random_texts(preprocessor: TextPreprocessor, shortest: int = 8) -> list[str]:
    """Texts of random words, of all lengths."""
    random, words = np.random.default_rng(0), preprocessor.words()
    lengths = np.exp(random.uniform(np.log(shortest), np.log(preprocessor.positions + 1), size=_COUNT)).astype(int)
    return [" ".join(random.choice(words, size=max(1, length - 2))) for length in lengths]


def random_requests(preprocessor: Preprocessor, shortest: int = 8) -> list[dict[str, np.ndarray]]:
    """Tensors of random texts or images, one in each."""
    if isinstance(preprocessor, TextPreprocessor):
        return [dict(preprocessor([text]).inputs) for text in random_texts(preprocessor, shortest)]
    settings, random = preprocessor.settings, np.random.default_rng(0)
    shape = (1, settings.height, settings.width, settings.channels)
    return [{"pixels": random.integers(0, 256, shape, dtype=np.uint8)} for _ in range(_COUNT)]
