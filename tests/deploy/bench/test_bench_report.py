"""The report: one page that loads nothing, escapes everything, and looks right in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from bench_results import accuracy, bench, faithfulness, latency, made_up, serving

from rekd_deploy.bench.report import drawn, headline, write_report
from rekd_deploy.bench.results import write_result
from rekd_deploy.bench.sections import Chart, section_of
from rekd_deploy.errors import BenchmarkError

RESULTS = [latency(), serving(), accuracy(), faithfulness()]


class Page(HTMLParser):
    """Elements, addresses and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.ids = text, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [value for name, value in attributes if name == "id"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole report on disk."""
    return write_report("A report", RESULTS, tmp_path_factory.mktemp("report") / "report.html", ["A note."])


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text(encoding="utf-8"))


def test_the_page_is_self_contained(page):
    assert not {"script", "iframe"} & {*page.tags}
    assert [each for each in page.addresses if not each.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(", page.text) and len(page.text) < 400_000
    targets = [each[1:] for each in page.addresses if each.startswith("#")]
    assert targets and {*targets} <= {*page.ids} and len(page.ids) == len({*page.ids})


def test_nothing_in_a_result_becomes_markup(page):
    assert "<script" not in page.text and "<i>" not in page.text and "&lt;script&gt;" in page.text


def test_every_kind_has_its_section_and_charts(page):
    assert page.tags.count("svg") == 2 + 2 + 2  # accuracy; latency over batch and length; serving
    for heading in ("Is it right?", "Is the rationale the reason?", "What does a prediction cost?", "when served?"):
        assert heading in page.text
    assert "1 of 3 checks failed, 1 did not apply" in page.text and "A note." in page.text
    assert page.text.index("mask alone") < page.text.index("served as trained"), "failures first"


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"failed": 1, "passed": 2, "not applicable": 1}, "1 of 3 checks failed, 1 did not apply"),
        ({"passed": 3}, "All 3 checks passed"), ({"passed": 1}, "The one check passed"), ({}, "No check applied"),
    ],
)  # fmt: skip
def test_the_headline_counts(counts, said):
    assert headline(counts) == said


def test_the_findings_are_the_measured_ratios():
    taken = "Reading only the rationale takes"
    assert section_of(latency()).lead == [
        f"{taken} 0.60 (0.59 to 0.61) of the time of blanking words at batch 8, length 256, fp32, K 32.",
        f"{taken} 1.20 (1.18 to 1.22) of the time of a plain classifier at batch 8, length 256, fp32, K 32.",
    ]
    assert section_of(serving()).lead[0] == (
        "One request at a time takes 8.0 ms through the server and 5.0 ms in process: 1.60 times as long "
        "(1.50 to 1.70), 3.00 ms more."
    )


def test_tables_show_the_figures():
    rows = {table.title: table.rows for made in RESULTS for table in section_of(made).tables}
    assert ("10%", "84.0%", "84.0%") in rows["Accuracy by share kept"]
    assert ("positive", "0.800", "0.900", "0.850", "1,000") in rows["Classes"]
    assert ("open, 60.0 a second", "8.0", "10.4", "12.0", "120.0", "0") in rows["Loads"] and len(rows["Loads"]) == 6
    inside = rows["Inside the server, mean milliseconds of a request"]
    assert inside[0][:4] == ("selector, 1 client", "1.00", "0.10", "2.50")
    assert ("independent: comprehensiveness", "0.300 [0.200, 0.400]") in rows["judges"]
    assert len(rows["Times"]) == 20 and rows["Not run here"][0][1] == "no compiler | here"


def test_other_kinds_are_tables_and_missing_figures_are_said(tmp_path):
    table = {"title": "T", "columns": ["a", "b"], "rows": [["1", "2"]]}
    made = made_up("novel", {"group": {"inner_figure": 0.5}, "tables": [table]})
    text = write_report("R", [made], tmp_path / "r.html")[1].read_text()
    assert "| inner figure | 0.500 |" in text and "### T\n" in text and "| 1 | 2 |" in text
    with pytest.raises(BenchmarkError, match="'latency' lacks figures"):
        write_report("R", [made_up("latency", {})], tmp_path / "none.html")
    with pytest.raises(BenchmarkError, match="nothing to report"):
        write_report("R", [], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_the_summary_has_whole_tables(written):
    text = written[1].read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for lines in (table.splitlines() for table in tables):
        assert len(lines) > 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines
    assert len(tables) > 8 and "1 of 3 checks failed" in text


def test_a_chart_lies_in_its_frame():
    chart = Chart("c", {"one": ([1, 2, 8], [1.0, 4.0, 16.0])}, "x", "y")
    assert drawn(chart)["lines"] == [[(0.0, 1.0), (0.1429, 0.8), (1.0, 0.0)]]
    assert drawn(chart)["y"][1] == (0.8, "4") and len(drawn(chart)["x"]) == 6
    logarithmic = drawn(chart._replace(logarithmic=True))
    assert logarithmic["lines"][0][1] == (0.3333, 0.5) and logarithmic["x"] == [(0.0, "1"), (0.3333, "2"), (1.0, "8")]
    shares = Chart("c", {"one": ([0.5], [0.25])}, "x", "y", percent=True, diagonal=True)
    assert drawn(shares)["lines"] == [[(0.5, 0.75)]] and drawn(shares)["x"][1] == (0.2, "20%")


def test_the_command_makes_both(tmp_path, capsys):
    files = [write_result(tmp_path / f"{result.kind}.json", result) for result in (accuracy(), faithfulness())]
    page = tmp_path / "out" / "page.html"
    assert bench("report", *files, "-o", page, "--title", "Mine") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["bytes"] == page.stat().st_size and "<h1>Mine</h1>" in page.read_text()
    assert (tmp_path / "out" / "page.md").is_file()


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
    assert loaded and [each for each in loaded if not each.startswith(("data:", address))] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert len(heights) > 50 and min(heights) >= 8, "letters of charts on a phone"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")
