"""The tables under benchmarks/: finished cells are kept, changed ones are run again, and the figures are the cells'."""

import json
import re
from pathlib import Path

import imdb_table
import numpy as np
import pytest
import typer
from _cells import Cell, Table, execute
from _models import bits, from_bits
from _recipes import distillation_cells, distillation_rows, mosaic_cells, seeds_of
from _tables import accuracy_table, comparison_table, mean_and_std, paired_bootstrap

from rekd_train.config.run import RunConfig, run_config

pytestmark = pytest.mark.slow


def cells(seeds=(1, 2), size: int = 4, teacher: int = 8) -> list[Cell]:
    return [cell for seed in seeds for cell in (
        Cell("teacher", seed, "train", {"size": teacher}),
        Cell("student", seed, "train", {"size": size}, {"teacher": "teacher"}),
        Cell("mask", seed, "masks", None, {"predictor": "student"}, {"which": "random"}))]  # fmt: skip


class Worker:
    def __init__(self, fail: str = "") -> None:
        self.fail, self.done = fail, []

    def __call__(self, job: dict) -> dict:
        for path in job["needs"].values():
            assert Path(path).is_dir(), f"{job['name']} needs {path}"
        identity = f"{job['name']}_{job['seed']}"
        if identity == self.fail:
            raise ValueError("diverged")
        self.done.append(identity)
        if job["kind"] == "train":
            Path(job["output"]).mkdir(parents=True, exist_ok=True)
        return {"accuracy": 0.5, "rate": 0.1, "seconds": 1.0, "shown": job["config"] or float("nan")}


def table_of(folder: Path, chosen: list[Cell], code: str = "a", any_code: bool = False) -> Table:
    return Table(chosen, folder / "results", folder / "work", code, {"device": "cpu"}, any_code)


def ran(*table, **options) -> list[str]:
    """The cells that are not finished, which now are."""
    worker = Worker()
    assert execute(table_of(*table, **options), worker, 1, lambda line: None) == 0
    return worker.done


def test_what_is_done_is_kept(tmp_path) -> None:
    everything = ["teacher_1", "student_1", "mask_1", "teacher_2", "student_2", "mask_2"]
    assert ran(tmp_path, cells()) == everything
    stored = json.loads((tmp_path / "results" / "student_2.json").read_text())
    assert (stored["cell"], stored["seed"], stored["config"]) == ("student", 2, {"size": 4})
    assert "NaN" not in (tmp_path / "results" / "mask_1.json").read_text()
    assert ran(tmp_path, cells()) == []
    assert ran(tmp_path, cells(size=5)) == ["student_1", "mask_1", "student_2", "mask_2"]
    assert ran(tmp_path, cells((1, 2, 3), size=5)) == ["teacher_3", "student_3", "mask_3"]
    assert ran(tmp_path, cells(size=5), code="b", any_code=True) == []
    assert ran(tmp_path, cells(size=5), code="b") == everything


def test_students_learn_from_one_teacher_and_what_is_lost_is_made_again_if_needed(tmp_path) -> None:
    other = Cell("student", 2, "train", {"size": 4}, {"teacher": "teacher@1"})
    chosen = [*cells((1,))[:2], other]
    for each in (chosen, [*cells((1,), teacher=9)[:2], other]):
        assert ran(tmp_path, each) == ["teacher_1", "student_1", "student_2"]
    table, needs = table_of(tmp_path, chosen), {"teacher": str(tmp_path / "work" / "teacher_1")}
    assert table.job(chosen[1])["needs"] == table.job(chosen[2])["needs"] == needs
    ran(tmp_path, cells((1,)))
    for record in (tmp_path / "work").glob("*.key.json"):
        record.unlink()
    assert ran(tmp_path, cells((1,))) == []
    (tmp_path / "results" / "mask_1.json").unlink()
    assert ran(tmp_path, cells((1,))) == ["teacher_1", "student_1", "mask_1"]
    (tmp_path / "results" / "student_1.json").write_text('{"cell": "stud')
    assert ran(tmp_path, cells((1,))) == ["student_1"]


def test_a_failure_costs_what_needs_it_alone_and_processes_keep_the_order_of_needs(tmp_path) -> None:
    worker, lines = Worker(fail="student_1"), []
    assert execute(table_of(tmp_path, cells()), worker, 1, lines.append) == 2
    assert worker.done == ["teacher_1", "teacher_2", "student_2", "mask_2"]
    assert any("student_1 failed: ValueError: diverged; not run for it: mask_1" in line for line in lines)
    assert ran(tmp_path, cells()) == ["student_1", "mask_1"]
    table = table_of(tmp_path, cells())
    assert execute(table, in_a_process, 2, lambda line: None) == 0 and not table.pending()


def in_a_process(job: dict) -> dict:
    return Worker()(job)


def results(accuracies: dict[str, list[float]], rate: float = 0.1) -> dict:
    generator = np.random.default_rng(0)
    def cell(share: float) -> dict:
        correct = bits(generator.permutation(np.arange(200) < round(200 * share)))
        return {"accuracy": share, "rate": rate, "ece": 0.01, "seconds": 2.0, "examples": 200, "correct": correct}
    return {name: dict(enumerate(map(cell, shares))) for name, shares in accuracies.items()}


def test_the_table_says_mean_spread_and_differences_and_the_bootstrap_agrees_with_drawing() -> None:
    row = ("re", "RE", 0.1)
    lines = accuracy_table(results({"re": [0.8, 0.82, 0.84]}), [row, ("rekd", "REKD", 0.1)])
    assert "| RE | 0.8200 ± 0.0200 | 3 | 10.00% ± 0.00 | 0.0100 ± 0.0000 | 2 |" in lines
    assert "| REKD | not run | 0 | | | |" in lines
    said = ["not matched" in accuracy_table(results({"re": [0.8]}, rate), [row])[-1] for rate in (0.104, 0.106)]
    assert said == [False, True]
    found = results({"re": [0.80, 0.82], "rekd": [0.84, 0.84, 0.1]})
    line = comparison_table(found, [("rekd", "re", "Does it help?")])[-1]
    mean, error, each = (part.strip() for part in line.split("|")[2:5])
    assert mean == "+3.00" and error == f"{np.std([4, 2], ddof=1) / np.sqrt(2):.2f}"
    assert re.findall(r"([+-][\d.]+) \[", each) == ["+4.0", "+2.0"]
    low, high = map(float, re.findall(r"\[([^,]+), ([^\]]+)\]", each)[0])
    assert low < 4.0 < high
    generator = np.random.default_rng(3)
    first, second = generator.random(150) < 0.8, generator.random(150) < 0.7
    measured = paired_bootstrap(first, second, draws=4000)
    rows = generator.integers(0, 150, (4000, 150))
    slow = first[rows].mean(axis=1) - second[rows].mean(axis=1)
    assert measured["difference"] == pytest.approx(first.mean() - second.mean())
    assert measured["standard_error"] == pytest.approx(slow.std(), rel=0.1)
    assert (measured["low"], measured["high"]) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.02)
    assert measured["p_not_better"] == pytest.approx(np.mean(slow <= 0), abs=0.02)
    assert paired_bootstrap(first, first)["p_not_better"] == 1.0
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0) and mean_and_std([4.0]) == (4.0, 0.0)


def test_recipes_name_what_they_need_and_leave_out_the_defaults() -> None:
    """So a field that is added later leaves finished cells finished."""
    student, teacher = run_config("fashion_student"), run_config("fashion_teacher")
    own, other = (distillation_cells(student, teacher, seed, teacher_seed=3) for seed in (3, 4))
    assert own == distillation_cells(student, teacher, 3)
    assert {cell.name for cell in own} - {cell.name for cell in other} == {"teacher", "teacher_cls"}
    needed = {identity for cell in other for identity in cell.needed.values()}
    assert needed <= {cell.identity for cell in (*own, *other)} and "teacher_3" in needed
    (cell,) = (cell for cell in own if cell.name == "re")
    assert "class_head" not in cell.config["predictor"] and cell.config["predictor"]["width"] == 64
    stages = student.stages.model_copy(update={"compact_epochs": 0.0})
    wanted = student.model_copy(update={"seed": 3, "stages": stages, "source": ""})
    assert RunConfig.model_validate(cell.config) == wanted
    student, teacher = run_config("equal_student"), run_config("demo_teacher")
    distilled, mosaic = distillation_cells(student, teacher, 3), mosaic_cells(run_config("mosaic_2x2"), 3)
    for recipe in (distilled, mosaic):
        seen = set()
        for cell in recipe:
            assert set(cell.needs.values()) <= seen and cell.seed == 3
            assert cell.config is None or RunConfig.model_validate(cell.config).seed == 3
            seen.add(cell.name)
    assert [row[0] for row in distillation_rows(student, teacher, "words")] == [cell.name for cell in distilled]
    by_name, given = ({cell.name: cell for cell in recipe} for recipe in (distilled, mosaic))
    config = {name: RunConfig.model_validate(cell.config) for name, cell in by_name.items() if cell.config}
    assert config["re"] == config["rekd"], "REKD differs from RE by its teacher alone"
    assert by_name["re"].needs.keys() & by_name["rekd"].needs.keys() == {"warm_start"}
    assert config["cls"].stages.masked_share == config["cls"].stages.rationale_epochs == 0
    assert config["cls_kd"].distillation.classifier and not config["cls"].distillation.classifier
    assert config["cls_kd"].stages == config["cls"].stages and config["re"].stages.compact_epochs == 0
    assert by_name["re_compact"].options["epochs"] == student.stages.compact_epochs
    assert given["given"].config["data"]["other_tiles"] == "blank"
    assert RunConfig.model_validate(given["cls"].config).data.other_tiles == "shuffled"
    assert seeds_of("1,20") == [1, 20]
    with pytest.raises(typer.BadParameter, match="no list of whole numbers"):
        seeds_of("1;2")


def test_a_real_cell_of_each_kind(tmp_path, run_cli) -> None:
    """The whole script on a few made-up texts."""
    words, texts = "the film was a story about people and time in the city".split(), tmp_path / "texts.jsonl"
    drawn = [" ".join(np.random.default_rng(number).choice(words, 12)) for number in range(80)]
    texts.write_text("".join(
        json.dumps({"text": f"{text} {number} {('awful', 'great')[number % 2]}", "label": number % 2}) + "\n"
        for number, text in enumerate(drawn)))  # fmt: skip
    small = ("word_embeddings=random", "width=8", "heads=2", "layers=1")
    settings = ["data.name=table", f"data.path={texts}", "data.train_examples=40", "data.max_length=24",
                "optimisation.batch_size=20",
                *(f"{role}.{each}" for role in ("selector", "predictor") for each in small)]  # fmt: skip
    arguments = ["--results", tmp_path / "results", "--work", tmp_path / "work", "--seeds", "7"]
    arguments += ["--only", "random_mask", "--draws", "2", *(part for each in settings for part in ("--set", each))]
    code, printed, _ = run_cli(imdb_table.app, *arguments)
    assert code == 0, printed
    stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "cpu").glob("*.json")}
    assert set(stored) == {"teacher_7", "warm_7", "rekd_7", "rekd_compact_7", "random_mask_7"}
    assert stored["random_mask_7"]["rate"] == stored["rekd_compact_7"]["rate"]
    assert stored["rekd_compact_7"]["report"]["operator"] == "compact"
    assert "teacher" in stored["rekd_7"]["report"] and stored["rekd_7"]["report"]["modes"]["sampled"]["draws"] == 2
    for result in stored.values():
        assert from_bits(result["correct"], result["examples"]).mean() == pytest.approx(result["accuracy"])
        assert result["environment"]["torch"]
    table = (tmp_path / "results" / "cpu.md").read_text()
    assert "| REKD compacted | " in table and "python benchmarks/imdb_table.py --size cpu --seeds 7" in table
