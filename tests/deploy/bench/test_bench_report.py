"""The report: one page that loads nothing, escapes everything, and looks right in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from bench_results import accuracy, faithfulness, latency, made_up, serving

from rekd_deploy.bench.report import drawn, headline, write_report
from rekd_deploy.bench.results import write_result
from rekd_deploy.bench.sections import Chart
from rekd_deploy.cli.bench import app
from rekd_deploy.errors import BenchmarkError

RESULTS = [latency(), serving(), accuracy(), faithfulness()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole report on disk."""
    return write_report("A report", RESULTS, tmp_path_factory.mktemp("report") / "report.html", ["A note."])


def test_the_page_is_self_contained_and_nothing_in_a_result_becomes_markup(written):
    text = written[0].read_text(encoding="utf-8")
    assert not re.search(r"<(script|iframe|i)\b|@import|url\(", text) and "&lt;script&gt;" in text
    addresses = re.findall(r'\b(?:src|href|srcset|action|data)\s*=\s*"?([^"\s>]*)', text)
    targets, ids = {each[1:] for each in addresses if each[0] == "#"}, re.findall(r'\bid="([^"]*)"', text)
    assert all(each.startswith(("#", "data:")) for each in addresses) and len(text) < 400_000
    assert targets and targets <= {*ids} and len(ids) == len({*ids})


def test_every_kind_has_its_section_charts_tables_and_findings(written):
    """In Markdown the whole of it: findings, failures first, tables with their figures, cells that hold a bar."""
    page, summary = (path.read_text(encoding="utf-8") for path in written)
    assert page.count("<svg") == 2 + 2 + 2  # accuracy; latency over batch and length; serving
    assert summary == (Path(__file__).parents[2] / "golden" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("counts", "said"), [
    ({"passed": 3}, "All 3 checks passed"), ({"passed": 1}, "The one check passed"), ({}, "No check applied"),
])
def test_the_headline_counts(counts, said):
    assert headline(counts) == said


def test_other_kinds_are_tables_and_missing_figures_are_said(tmp_path):
    table = {"title": "T", "columns": ["a", "b"], "rows": [["1", "2"]]}
    made = made_up("novel", {"group": {"inner_figure": 0.5}, "tables": [table]})
    text = write_report("R", [made], tmp_path / "r.html")[1].read_text()
    assert "| inner figure | 0.500 |" in text and "### T\n" in text and "| 1 | 2 |" in text
    for results, said in (([made_up("latency", {})], "'latency' lacks figures"), ([], "nothing to report")):
        with pytest.raises(BenchmarkError, match=said):
            write_report("R", results, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_a_chart_lies_in_its_frame():
    chart = Chart("c", {"one": ([1, 2, 8], [1.0, 4.0, 16.0])}, "x", "y")
    assert drawn(chart)["lines"] == [[(0.0, 1.0), (0.1429, 0.8), (1.0, 0.0)]]
    assert drawn(chart)["y"][1] == (0.8, "4") and len(drawn(chart)["x"]) == 6
    logarithmic = drawn(chart._replace(logarithmic=True))
    assert logarithmic["lines"][0][1] == (0.3333, 0.5) and logarithmic["x"] == [(0.0, "1"), (0.3333, "2"), (1.0, "8")]
    shares = drawn(Chart("c", {"one": ([0.5], [0.25])}, "x", "y", percent=True, diagonal=True))
    assert shares["lines"] == [[(0.5, 0.75)]] and shares["x"][1] == (0.2, "20%")


def test_the_command_makes_both(tmp_path, run_cli):
    files = [write_result(tmp_path / f"{result.kind}.json", result) for result in (accuracy(), faithfulness())]
    page = tmp_path / "out" / "page.html"
    code, printed, _ = run_cli(app, "report", *files, "-o", page, "--title", "Mine")
    assert code == 0 and json.loads(printed.splitlines()[-1])["bytes"] == page.stat().st_size
    assert "<h1>Mine</h1>" in page.read_text() and page.with_suffix(".md").is_file()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A real Chromium without a screen, that records console and network."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-quic",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    yield driver
    driver.quit()


@pytest.mark.debian
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_a_browser_shows_it_without_a_complaint(browser, written, width, scheme):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("performance")
    browser.get(address := written[0].resolve().as_uri())
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    loaded = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"
              and each["params"]["documentURL"].startswith(address)]  # fmt: skip
    assert loaded and all(each.startswith(("data:", address)) for each in loaded)
    heights, paper, wide = browser.execute_script(
        "return [[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height),"
        "getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth]"
    )
    assert wide <= width, "nothing sticks out"
    assert len(heights) > 50 and min(heights) >= 8, "letters of charts on a phone"
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")
