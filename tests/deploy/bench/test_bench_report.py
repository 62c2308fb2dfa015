"""Results of rekd-bench: files, the comparison of two, and the report, which looks right in a real browser."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from bench_results import accuracy, faithfulness, latency, made_up, serving

from rekd_deploy.bench.report import Figure, change_of, compare, drawn, headline, write_report
from rekd_deploy.bench.results import Check, Input, nvidia_smi, read_result, result, write_result
from rekd_deploy.bench.sections import Chart
from rekd_deploy.cli.bench import app
from rekd_deploy.errors import BenchmarkError

RESULTS = [latency(), serving(), accuracy(), faithfulness()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_report("A report", RESULTS, tmp_path_factory.mktemp("report") / "report.html", ["A note."])


def test_the_page_is_self_contained_and_every_kind_has_its_section_charts_tables_and_findings(written):
    text = written[0].read_text(encoding="utf-8")
    assert not re.search(r"<(script|iframe|i)\b|@import|url\(", text) and "&lt;script&gt;" in text
    addresses = re.findall(r'\b(?:src|href|srcset|action|data)\s*=\s*"?([^"\s>]*)', text)
    targets, ids = {each[1:] for each in addresses if each[0] == "#"}, re.findall(r'\bid="([^"]*)"', text)
    assert all(each.startswith(("#", "data:")) for each in addresses) and len(text) < 400_000
    assert targets and targets <= {*ids} and len(ids) == len({*ids})
    page, summary = (path.read_text(encoding="utf-8") for path in written)
    assert page.count("<svg") == 2 + 2 + 2  # accuracy; latency over batch and length; serving
    assert summary == (Path(__file__).parents[2] / "golden" / "report.md").read_text(encoding="utf-8")
    said = ["All 3 checks passed", "The one check passed", "No check applied"]
    assert [headline(counts) for counts in ({"passed": 3}, {"passed": 1}, {})] == said


def test_other_kinds_are_tables_missing_figures_are_said_and_charts_lie_in_their_frames(tmp_path):
    table = {"title": "T", "columns": ["a", "b"], "rows": [["1", "2"]]}
    made = made_up("novel", {"group": {"inner_figure": 0.5}, "tables": [table]})
    text = write_report("R", [made], tmp_path / "r.html")[1].read_text()
    assert "| inner figure | 0.500 |" in text and "### T\n" in text and "| 1 | 2 |" in text
    for results, said in (([made_up("latency", {})], "'latency' lacks figures"), ([], "nothing to report")):
        with pytest.raises(BenchmarkError, match=said):
            write_report("R", results, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()
    chart = Chart("c", {"one": ([1, 2, 8], [1.0, 4.0, 16.0])}, "x", "y")
    assert drawn(chart)["lines"] == [[(0.0, 1.0), (0.1429, 0.8), (1.0, 0.0)]]
    assert drawn(chart)["y"][1] == (0.8, "4") and len(drawn(chart)["x"]) == 6
    logarithmic = drawn(chart._replace(logarithmic=True))
    assert logarithmic["lines"][0][1] == (0.3333, 0.5) and logarithmic["x"] == [(0.0, "1"), (0.3333, "2"), (1.0, "8")]
    shares = drawn(Chart("c", {"one": ([0.5], [0.25])}, "x", "y", percent=True, diagonal=True))
    assert shares["lines"] == [[(0.5, 0.75)]] and shares["x"][1] == (0.2, "20%")


@pytest.mark.debian
def test_a_browser_shows_it_without_a_complaint_on_a_desk_and_on_a_phone(written, tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options, address = webdriver.ChromeOptions(), written[0].resolve().as_uri()
    options.binary_location = shutil.which("chromium")
    own = f"user-data-dir={tmp_path}"
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync", own):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options) as browser:
        for width, scheme in ((1280, "light"), (360, "dark")):
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get_log("performance")
            browser.get(address)
            assert browser.get_log("browser") == []
            sent = [json.loads(entry["message"])["message"]["params"] for entry in browser.get_log("performance")]
            loaded = [each["request"]["url"] for each in sent if each.get("documentURL", "").startswith(address)]
            assert loaded and all(each.startswith(("data:", address)) for each in loaded)
            heights, paper, wide = browser.execute_script(
                "return [[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height),"
                "getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth]")
            assert wide <= width, "nothing sticks out"
            assert len(heights) > 50 and min(heights) >= 8, "letters of charts on a phone"
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")


LIMITS = {"percent": 10.0, "points": 1.0}


def test_a_result_comes_back_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "accuracy", "my repo"])
    checks = [Check(name="a", outcome="failed", words="too much", value=2.0, limit=1.0),
              Check(name="b", outcome="passed", words="fine", value=float("nan"))]  # fmt: skip
    figures = {"section": {"accuracy": 0.5, "nothing": float("nan")}}
    made = result("accuracy", figures, checks=checks, inputs={"data": Input(name="toy", sha256="ab")})
    path = write_result(tmp_path / "new" / "accuracy.json", made)
    assert read_result(path) == made and [check.name for check in made.failed] == ["a"]
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("rekd-bench", 1)
    assert document["command"] == "rekd-bench accuracy 'my repo'"
    assert document["figures"] == {"section": {"accuracy": 0.5, "nothing": None}}, "JSON has no NaN"
    hardware = document["hardware"]
    assert document["checks"][1]["value"] is None and hardware["processor"]
    assert hardware["cores"] >= 1 and hardware["memory_gb"] > 0
    assert {"rekd", "python", "numpy"} <= set(document["versions"])
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'a card, 590.1'")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert nvidia_smi("name", "driver_version") == [["a card", "590.1"]]


@pytest.mark.parametrize(("change", "said"), [
    (lambda text: json.dumps(json.loads(text) | {"format": "other"}), "no result of rekd-bench"),
    (lambda text: json.dumps(json.loads(text) | {"version": 99}), "version 99"),
    (lambda text: json.dumps(json.loads(text) | {"checks": [{"name": "x", "outcome": "maybe"}]}), "damaged"),
    (lambda text: f"[{text}]", "no result of rekd-bench"), (lambda text: text[:40], "damaged"),
    (None, "cannot be read: No such file")], ids=["format", "version", "field", "list", "cut off", "missing"])
def test_what_is_no_result_is_refused(tmp_path, change, said) -> None:
    path = tmp_path / "r.json"
    if change:
        path.write_text(change(accuracy().model_dump_json()))
    with pytest.raises(BenchmarkError, match=f"r.json .*{said}.*fix:"):
        read_result(path)


@pytest.mark.parametrize(("old", "new", "outcome"), [
    ((10.0, 9.8, 10.2), (11.5, 11.3, 11.7), "worse"), ((10.0, 8.0, 12.0), (11.5, 10.0, 13.0), "within the noise"),
    ((10.0, 9.8, 10.2), (10.9, 10.7, 11.1), "same"), ((10.0, 9.8, 10.2), (8.0, 7.9, 8.1), "better"),
    ((0.80, 2000), None, "worse"), ((0.835, 2000), None, "same"), ((0.90, 2000), None, "better"),
    ((0.82, 100), None, "within the noise")])  # fmt: skip
def test_times_and_accuracies_in_points(old, new, outcome):
    """Of accuracies the share and the examples, against 0.84."""
    if new:
        assert change_of("p50", Figure(*old), Figure(*new), 10.0, 1.0).outcome == outcome
    else:
        found = compare(accuracy(0.84, old[1]), accuracy(*old), **LIMITS)
        assert {change.name: change.outcome for change in found.changes}["accuracy"] == outcome


def test_what_is_slower_or_fails_now_is_worse_unless_the_machine_is_noisy_or_another():
    slower = compare(latency(), latency(factor=1.3), **LIMITS).worse
    assert "batch 8, length 256: ONNX Runtime fp32, compacted, K 32, p50 ms" in slower
    assert "batch 8, length 256: ONNX Runtime fp32, compacted, K 32 / ONNX Runtime fp32, zeroed" in slower
    assert not [name for name in slower if "fp32, zeroed, p50" in name]
    assert not compare(latency(spread=0.4), latency(factor=1.3, spread=0.4), **LIMITS).worse
    slow = serving()
    for load in slow.figures["closed"]:
        load["throughput"] = {"ratio": 0.6, "low": 0.55, "high": 0.65}
    names = [f"concurrency {count}: throughput, served / in process" for count in (1, 4)]
    assert compare(serving(), slow, **LIMITS).worse == names
    assert compare(faithfulness("passed"), faithfulness("failed"), **LIMITS).worse == ["the check 'mask alone'"]
    assert "cores: 2 -> 64" in compare(latency(), OTHER, **LIMITS, other_hardware=True).notes
    assert compare(latency(), changed(latency(), hardware={"memory_gb": 9.0}), **LIMITS).changes
    for each in RESULTS:
        found = compare(each, each, **LIMITS)
        assert found.changes and {change.outcome for change in found.changes} == {"same"} and not found.worse


def changed(made, **fields):
    return made.model_copy(update={name: {**getattr(made, name), **each} for name, each in fields.items()})


OTHER = changed(latency(), hardware={"cores": 64})


@pytest.mark.parametrize(("old", "new", "said"), [
    (latency(), serving(), "'latency', the new of 'serving'"), (latency(), OTHER, "cores: 2 -> 64.*--other-hardware"),
    (accuracy(), changed(accuracy(), inputs={"data": Input(name="reviews", sha256="c" * 64)}), "different data"),
    (latency(), changed(latency(), figures={"cells": []}), "no figure in common"),
    (latency(), latency().model_copy(update={"figures": {}}), "lacks figures")])
def test_what_cannot_be_compared_is_refused(old, new, said):
    with pytest.raises(BenchmarkError, match=said):
        compare(old, new, **LIMITS)


def test_the_commands_make_both_and_end_with_1_where_it_is_worse(tmp_path, run_cli):
    files = [write_result(tmp_path / f"{factor}.json", latency(factor)) for factor in (1.0, 1.3)]
    page = tmp_path / "out" / "page.html"
    code, printed, _ = run_cli(app, "report", *files, "-o", page, "--title", "Mine")
    assert code == 0 and json.loads(printed.splitlines()[-1])["bytes"] == page.stat().st_size
    assert "<h1>Mine</h1>" in page.read_text() and page.with_suffix(".md").is_file()
    code, printed, errors = run_cli(app, "compare", *files, "--fail-above", "10%")
    assert code == 1 and "compacted, K 32, p50 ms" in errors and errors.count("\n") == 1
    assert json.loads(printed.splitlines()[-1])["worse"] and "worse: batch 1, length 64" in printed
    code, printed, _ = run_cli(app, "compare", *files, "--fail-above", "50%", "--json")
    found = json.loads(printed)
    assert (code, found["worse"], found["changes"][0]["unit"]) == (0, [], "%")
    assert run_cli(app, "compare", *files, "--fail-above", "much")[0] == 2
