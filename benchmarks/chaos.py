"""Many askers while a server is killed, started again, stopped for a moment, given new versions, and a full disk.

``rekd-serve --reload --restart on-failure --http`` serves versions of two checkpoints in turn; what happens to it, and
when, is drawn by a seed. Counted are wrong answers (each is compared with the pipeline's of the version that it names),
lost calls (neither an answer nor an error by the deadline), untyped errors (none of the client's tree), and the askers'
memory over time. The last half minute is quiet: then every way of asking must be answered again.

    python benchmarks/chaos.py runs/demo/student runs/demo/student_without_teacher -o benchmarks/results/chaos.json

The full disk is a small tmpfs, which takes root; without it that part is left out. Prints what it does on stderr.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _askers import answer_of
from _served import Served, stop
from serving_throughput import keep

from rekd_train.cli.command import application, examples, run

DEADLINE = 8.0
"""Seconds a call may take."""
_QUIET_SECONDS = 30.0
"""Without chaos, at the end."""
_FLAT_MB = 30.0
"""By so much the median of the askers' memory may grow from the second third of the time to the last."""
_READY_SECONDS = 60.0
"""So long the next thing waits for the server to be ready again."""
_COPIES = 5
"""Of a repository, that the disk of the server's copies has room for."""
_TEXTS = 48
_SAID = ("not reloaded", "reloaded", "version", "starting again", "the server")
"""How those lines of rekd-serve begin that are counted."""

app = application(
    help="Hold a server and its clients to their promises while things break.",
    epilog=examples("chaos.py CKPT OTHER_CKPT", "chaos.py CKPT OTHER_CKPT --seconds 180 --seed 7"),
)


class Chaos:
    """What happens to a server; each method is one thing, and returns when it is over."""

    def __init__(self, served: Served, publish: Callable[[], int], disk: Path | None, chance: random.Random) -> None:
        self._served, self._publish, self._disk, self._chance = served, publish, disk, chance
        self.published = 1
        self._newer = ThreadPoolExecutor(1)
        things = {self.new_version: 4, self.kill_triton: 2, self.kill_process_of_a_model: 1, self.kill_everything: 1,
                  self.restart: 1, self.stop_triton: 3, self.stop_front: 1}  # fmt: skip
        self._things = things | ({self.full_disk: 2} if disk is not None else {})
        self.happened: Counter[str] = Counter()

    def go_on(self, until: float) -> None:
        """Let things happen until a ``time.monotonic``."""
        waiting = list(self._things)  # each once, before any comes twice
        while time.monotonic() < until:
            self._chance.shuffle(waiting)
            thing = waiting.pop() if waiting else self._chance.choices([*self._things], [*self._things.values()])[0]
            typer.echo(f"{until - time.monotonic():5.0f} s left: {thing.__name__}", err=True)
            self.happened[thing.__name__] += 1
            thing()
            self._served.wait_until_ready(min(until, time.monotonic() + _READY_SECONDS))
            time.sleep(self._chance.uniform(2.0, 10.0))

    def new_version(self) -> None:
        """Export the other checkpoint; the server exchanges it when it may."""
        self.published = self._publish()

    def kill_triton(self) -> None:
        """It is started again by rekd-serve."""
        for process in self._served.family()[:1]:
            stop(process, signal.SIGKILL)

    def kill_process_of_a_model(self) -> None:
        """The python backend has one for each instance."""
        if steps := self._served.family()[1:]:
            stop(self._chance.choice(steps), signal.SIGKILL)

    def kill_everything(self) -> None:
        """As where the machine's memory is full; somebody starts it again."""
        self._served.end(signal.SIGKILL)
        time.sleep(self._chance.uniform(0.0, 3.0))
        self._served.start()

    def restart(self) -> None:
        """An orderly end and a new start."""
        self._served.end(signal.SIGTERM)
        self._served.start()

    def stop_triton(self) -> None:
        """It does not run for a while, and holds its connections."""
        family = self._served.family()
        for process in family:
            stop(process, signal.SIGSTOP)
        time.sleep(self._chance.uniform(0.2, DEADLINE * 1.2))
        for process in family:
            stop(process, signal.SIGCONT)

    def stop_front(self) -> None:
        """The same for rekd-serve."""
        self._served.signal(signal.SIGSTOP)
        time.sleep(self._chance.uniform(0.2, DEADLINE))
        self._served.signal(signal.SIGCONT)

    def full_disk(self) -> None:
        """No room for the copy of a new version, nor for the log."""
        assert self._disk is not None
        filler = self._disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"\0" * (1 << 20)):
                pass
        self.new_version()
        time.sleep(self._chance.uniform(3.0, 8.0))
        filler.unlink()


def versions(checkpoints: tuple[Path, Path], folder: Path) -> tuple[Callable[[], int], dict[str, Any]]:
    """A function that publishes the next version at ``folder / 'repository'``, and what the pipelines say.

    Odd versions are of the first checkpoint, even ones of the second.
    """
    from rekd_deploy import Pipeline
    from rekd_deploy.export.graphs import export
    from rekd_deploy.repository.manifest import Versions
    from rekd_deploy.repository.reader import read_manifest
    from rekd_deploy.repository.writer import write_repository
    from rekd_deploy.tuning.trials import random_texts

    made, found, texts = [], [], []
    for number, checkpoint in enumerate(checkpoints):
        (work := folder / f"artefacts{number}").mkdir()
        made.append(export(checkpoint, work, single_graph=True))
        with Pipeline(made[-1]) as pipeline:
            texts = texts or random_texts(pipeline.preprocessor)[:_TEXTS]
            found.append([answer_of(each) for each in pipeline.predict(texts)])
    told = [index for index, (one, another) in enumerate(zip(*found, strict=True)) if one != another]
    texts, found = [texts[index] for index in told], [[each[index] for index in told] for each in found]
    root, count = folder / "repository", [0]

    def publish() -> int:
        write_repository(made[count[0] % 2], root)
        count[0] += 1
        assert Versions.of(read_manifest(root)).current == count[0]
        return count[0]

    publish()
    return publish, {"texts": texts, "makers": found}


def small_disk(place: Path, repository: Path) -> Path | None:
    """A tmpfs of its own for the server's copies; None: it cannot be made here."""
    size = _COPIES * sum(file.stat().st_size for file in repository.rglob("*") if file.is_file())
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "rekd-chaos", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        typer.echo("no small disk can be mounted (it takes root): the full disk is left out", err=True)
        return None
    return place


@app.command()
def chaos(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Of texts.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="With the same tokenizer and labels.")],
    seconds: Annotated[float, typer.Option(min=60, help="In all, the quiet end included.")] = 600.0,
    askers: Annotated[int, typer.Option(min=8, help="That ask at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what happens.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the figures go.")] = None,
) -> None:
    """Let it happen, print the figures and write them; exit code 1: a promise was broken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publish, expected = versions((checkpoint, other), folder)
        disk = small_disk(folder / "disk", folder / "repository")
        try:
            figures = _during(folder, publish, expected, disk, seconds, askers, random.Random(seed))
        finally:
            if disk is not None:
                subprocess.run(["umount", "-l", str(disk)], check=False)
    keep({"settings": {"seconds": seconds, "askers": askers, "seed": seed, "deadline": DEADLINE,
                       "texts": len(expected["texts"])}, **figures}, output)  # fmt: skip
    if figures["broken"]:
        raise typer.Exit(1)


def _during(
    folder: Path, publish: Callable[[], int], expected: dict[str, Any], disk: Path | None, seconds: float, askers: int,
    chance: random.Random,
) -> dict[str, Any]:
    options = ["--reload", "--restart", "on-failure", "--restart-limit", "1000", "--http", "0",
               "--limit", f"seconds={DEADLINE:g}", "--limit", f"requests={askers}"]  # fmt: skip
    files = {part: folder / f"{part}.json" for part in ("addresses", "expected", "found")}
    with Served(folder / "repository", disk or folder, *options, temporary=disk, output=folder / "output") as served:
        files["addresses"].write_text(json.dumps(served.addresses))
        files["expected"].write_text(json.dumps(expected))
        given = [files["addresses"], files["expected"], askers, DEADLINE, files["found"]]
        asking = subprocess.Popen([sys.executable, str(Path(__file__).with_name("_askers.py")), *map(str, given)])
        try:
            time.sleep(5)
            happening = Chaos(served, publish, disk, chance)
            happening.go_on(time.monotonic() + seconds - _QUIET_SECONDS)
            time.sleep(_QUIET_SECONDS)
        finally:
            asking.terminate()
            asking.wait(DEADLINE + 60)
        lines = (re.sub(r"\d[\d.]*", "N", line)[:90] for line in served.lines)
        said = Counter(line for line in lines if line.startswith(_SAID))
    return summary(json.loads(files["found"].read_text()), happening, said)


def summary(found: dict[str, Any], happening: Chaos, said: Counter[str]) -> dict[str, Any]:
    """The counts, and in words which promises were broken."""
    counts = {kind: sum(count for name, count in found["outcomes"].items() if name.startswith(f"{kind}:"))
              for kind in ("wrong", "untyped", "late", "typed")}  # fmt: skip
    memory = found["memory_mb"]
    third = len(memory) // 3
    middle, end = (round(median(size for _, size in part), 1) for part in (memory[third:-third], memory[-third:]))
    silent = {way: since for way, since in found["seconds_since_last_right"].items() if since > _QUIET_SECONDS / 2}
    broken = {
        "wrong answers": counts["wrong"], "lost calls": found["lost"] + counts["late"],
        "untyped errors": counts["untyped"], "ways of asking that were not answered again": len(silent),
        "memory that grows": int(end - middle > _FLAT_MB),
    }  # fmt: skip
    return {
        "happened": dict(happening.happened), "versions_published": happening.published,
        "calls": sum(count for name, count in found["outcomes"].items() if not name.startswith("late:")),
        "right": found["outcomes"].get("right", 0), **counts, "lost": found["lost"],
        "broken": [name for name, count in broken.items() if count],
        "memory_mb": {"median of the second third": middle, "of the last": end,
                      "over time": memory[:: max(len(memory) // 20, 1)]},
        **{name: value for name, value in found.items() if name not in ("memory_mb", "lost")},
        "said_by_the_server": dict(said.most_common(20)),
    }  # fmt: skip


if __name__ == "__main__":
    run(app)
