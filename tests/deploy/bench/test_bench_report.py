"""The report: one page that loads nothing, escapes everything, and looks right in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from bench_results import accuracy, bench, faithfulness, latency, made_up, serving

from rekd_deploy.bench.report import page as report_module
from rekd_deploy.bench.report.page import Report, markdown_page, read_answers, sections_of, verdict_of, write_report
from rekd_deploy.bench.report.parts import line_chart, stacked_bars
from rekd_deploy.bench.results import write_result
from rekd_deploy.errors import BenchmarkError
from rekd_train.inputs.prediction import Patch, Prediction, Span

pytest.importorskip("matplotlib")
RESULTS = [latency(), serving(), accuracy(), faithfulness()]


class Page(HTMLParser):
    """Elements, addresses and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


def answers_file(folder, image=None):
    """One short text, one long, and an image's answer if there is an image."""
    short = "Warm & <b>well</b> lit. A film."
    spans = [Span(0, 4, "Warm", 1.0), Span(24, 30, "A film", 0.5)]
    long = short + " It goes on and on." * 200
    far = [*spans, Span(len(long) - 3, len(long), "on.", 0.1)]
    documents = [
        Prediction("positive", {"negative": 0.1, "positive": 0.9}, found, 0.1, False, text, []).to_dict()
        for text, found in ((long, far), (short, spans))
    ]
    if image is not None:
        patches = [Patch(0, 1, (4, 0, 8, 4), 1.0)]
        answer = Prediction("shoe", {"shirt": 0.2, "shoe": 0.8}, patches, 0.1, False).to_dict()
        documents.append({"image": str(image), **answer})
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "shoe.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory, picture):
    """The whole report on disk."""
    folder = tmp_path_factory.mktemp("report")
    gallery = read_answers(answers_file(folder, picture), 10)
    report = Report("A report", RESULTS, gallery, ("A note.",))
    return write_report(report, folder / "report.html", folder / "report.md")


# the page


def test_the_page_is_self_contained(page):
    text = page[0].read_text(encoding="utf-8")
    found = Page(text)
    assert "script" not in found.tags and "iframe" not in found.tags and "link" in found.tags
    outside = [each for each in found.addresses if not each.startswith(("#", "data:"))]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert page[0].stat().st_size < 300_000


def test_everything_that_is_pointed_at_is_there_once(page):
    found = Page(page[0].read_text(encoding="utf-8"))
    assert len(found.ids) == len(set(found.ids))
    targets = {each[1:] for each in found.addresses if each.startswith("#")}
    clips = set(re.findall(r"url\(#([^)]+)\)", page[0].read_text(encoding="utf-8")))
    assert targets and clips and targets | clips <= set(found.ids)


def test_nothing_in_a_result_or_an_answer_becomes_markup(page):
    text = page[0].read_text(encoding="utf-8")
    assert "<script" not in text and "<i>" not in text and "<b>well" not in text
    assert "&lt;script&gt;" in text and "Warm" in text


def test_the_rationale_is_marked_and_long_texts_are_cut(page):
    text = page[0].read_text(encoding="utf-8")
    assert text.count("<mark>Warm</mark>") == 2 and text.count("<mark>A film</mark>") == 2
    assert "<mark>on.</mark>" not in text and "the rest is left out here" in text
    assert text.index("Warm") < text.index("the rest is left out"), "short texts come first"


def test_images_are_shown_with_their_patches(page):
    text = page[0].read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in text and 'alt="kept patches: row 1 column 2"' in text


def test_every_kind_has_its_section_and_charts(page):
    text = page[0].read_text(encoding="utf-8")
    assert text.count("<svg") == 2 + 2 + 2 + 3  # accuracy; latency over batch, length, two splits; serving
    for heading in ("Is it right?", "Is the rationale the reason?", "What does an answer cost?", "when served?"):
        assert heading in text


def test_the_verdict_counts_what_failed_and_puts_it_first():
    verdict = verdict_of(RESULTS, [])
    assert verdict.headline == "1 of 3 checks failed, 1 did not apply"
    assert [check.outcome for _, check in verdict.checks] == ["failed", "passed", "passed", "not applicable"]
    assert verdict_of([accuracy()], []).headline == "The one check passed"
    assert verdict_of([serving()], []).headline == "No check applied"


def test_the_findings_are_the_measured_ratios():
    (section,) = sections_of([latency()])
    assert section.lead == [
        "Reading only the rationale takes 0.60 (0.59 to 0.61) of the time of blanking words at batch 8, length 256, "
        "fp32, K 32.",
        "Reading only the rationale takes 1.20 (1.18 to 1.22) of the time of a plain classifier at batch 8, length "
        "256, fp32, K 32.",
    ]


def test_a_kind_that_is_not_known_is_a_table():
    text = markdown_page(Report("R", [made_up("novel", {"group": {"inner_figure": 0.5}})]))
    assert "| inner figure | 0.500 |" in text


def test_the_summary_has_whole_tables(page):
    lines = page[1].read_text(encoding="utf-8").splitlines()
    tables = 0
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(---\|)+", line):
            tables += 1
            columns = line.count("|") - 1
            assert re.sub(r"\\\|", "", lines[number - 1]).count("|") - 1 == columns
            row = number + 1
            assert lines[row].startswith("|"), "a table has rows"
            while row < len(lines) and lines[row].startswith("|"):
                assert re.sub(r"\\\|", "", lines[row]).count("|") - 1 == columns, lines[row]
                row += 1
    assert tables > 8
    assert "1 of 3 checks failed" in page[1].read_text(encoding="utf-8")


def test_a_report_of_nothing_and_a_page_too_large_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BenchmarkError, match="nothing to report"):
        write_report(Report("R", []), tmp_path / "r.html", tmp_path / "r.md")
    monkeypatch.setattr(report_module, "LARGEST_PAGE", 1000)
    with pytest.raises(BenchmarkError, match="fewer --answers"):
        write_report(Report("R", [accuracy()]), tmp_path / "r.html", tmp_path / "r.md")
    assert not list(tmp_path.iterdir())


# charts


def test_a_chart_wears_the_pages_colours():
    svg = line_chart({"one": ([1, 2], [1, 2])}, name="n", title="t < u", x="x", y="y", logarithmic=True, whole_x=True)
    assert not re.search(r"#[0-9a-f]{6}", svg) and "var(--c0)" in svg and "var(--ink)" in svg
    assert "<style" not in svg and "<metadata" not in svg and 'aria-label="t &lt; u"' in svg
    assert "width=" not in svg.split(">", 1)[0] and "viewBox" in svg


def test_a_chart_is_the_same_every_time():
    rows = {"a row with a long name that wraps": {"left": 1.0, "right": 2.0}, "b": {"left": 0.5}}
    first, second = (stacked_bars(rows, name="n", title="t", x="ms") for _ in range(2))
    assert first == second != stacked_bars(rows, name="other", title="t", x="ms")


# answers


@pytest.mark.parametrize("line", ["[]", "{}", "no json", '{"label": "a"}'])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="line 2 is no answer"):
        read_answers(path, 3)
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_answers(tmp_path / "none.jsonl", 3)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match="gone.png cannot be read"):
        read_answers(answers_file(tmp_path, tmp_path / "gone.png"), 3)


# the command and the browser


def test_the_command_makes_both(tmp_path, capsys):
    files = [write_result(tmp_path / f"{result.kind}.json", result) for result in (accuracy(), faithfulness())]
    page = tmp_path / "out" / "page.html"
    assert bench("report", *files, "-o", page, "--answers", answers_file(tmp_path)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["bytes"] == page.stat().st_size
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


def shown(browser, page, width: int, scheme: str):
    """Open the page on a screen of that width in that scheme; its console, and the addresses it asked for."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("performance")
    browser.get(address := page.resolve().as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    ours = [each["request"]["url"] for each in asked if each["documentURL"].startswith(address)]  # not a new tab's
    return browser.get_log("browser"), ours


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.debian
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")])
def test_a_browser_shows_it_without_a_complaint(browser, page, tmp_path, width, scheme):
    console, asked = shown(browser, page[0], width, scheme)
    assert console == []
    assert [each for each in asked if not each.startswith(("data:", page[0].resolve().as_uri()))] == []
    assert asked, "the recording works"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    picture = tmp_path / "page.png"
    assert browser.save_screenshot(str(picture))
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50, "something is drawn"
    most = max(colours)[1]
    assert (sum(most) > 600) == (scheme == "light")


@pytest.mark.debian
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_can_be_read_in_both_schemes(browser, page, scheme):
    shown(browser, page[0], 360, scheme)
    pairs = browser.execute_script("""
        const seen = [];
        for (const element of document.querySelectorAll("p, td, th, li, figcaption, blockquote, mark, .chip, .soft")) {
            let behind = element, paper;
            do { paper = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
            while (paper === "rgba(0, 0, 0, 0)" && behind);
            seen.push([getComputedStyle(element).color, paper, element.className || element.tagName]);
        }
        return seen;
    """)
    assert len(pairs) > 50
    for ink, paper, what in pairs:
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (what, ink, paper)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(height for height in heights if height) >= 8, "letters of charts on a phone"
