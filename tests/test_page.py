"""The report page: its numbers, that no data can become markup, and, in headless Chromium, that it
renders and filters."""

import json
import math
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from desc import DescError
from desc.domain import ESCONV
from desc.esconv import Dialogue
from desc.evaluation.figures import curves_html, phase_shares
from desc.evaluation.page import (
    confusion_html,
    errors_html,
    preferences_html,
    scores_html,
    write_page,
)
from desc.metrics import NO_INTERVAL

pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'desc[report]'")

EVIL = (
    '</script><script>window.hacked = 1; document.title = "hacked"</script><!--data--> <img src=x'
    ' onerror=window.hacked=1> & "q" \u2028'
)
NAMES = [*ESCONV.strategies, f"$x_1$ {EVIL}"]


def turns_of(dialogue: Dialogue) -> list[dict]:
    return [
        {"speaker": turn.speaker, "text": turn.text, "strategy": turn.strategy}
        for turn in dialogue.turns
    ]


def make_dialogues(sample: list[Dialogue]) -> list[dict]:
    """Three dialogues. In the second one the id, two texts and a strategy are hostile."""
    first, second, third = (
        {"id": dialogue.id, "turns": turns_of(dialogue)} for dialogue in sample[:3]
    )
    second["id"] = EVIL
    second["turns"][0]["text"] = EVIL
    second["turns"][1]["text"] = EVIL
    second["turns"][1]["strategy"] = NAMES[-1]
    return [first, second, third]


def make_answers(dialogues: list[dict]) -> dict[str, list[dict]]:
    """Records of two planners. "sft" has two seeds, and the first one errs once in a dialogue. The
    other planner always asks, but for its last turn; it gives no probabilities and no replies."""
    answers = {"sft": [], EVIL: []}
    for dialogue in dialogues:
        human = dialogue["turns"][1::2]
        gold = [turn["strategy"] for turn in human]
        count = len(gold)
        record = {
            "dialogue": dialogue["id"],
            "gold": gold,
            "human": [turn["text"] for turn in human],
        }
        probabilities = [0.6, 0.33333, *[0.06667 / 7] * 7]
        sft = {
            "predicted": [[*gold[:-1], "Others"], ["Information"] * count],
            "logps": [np.log(probabilities).tolist()] * count,
            "replies": [f"{EVIL} {turn}" for turn in range(count)],
        }
        evil = {"predicted": [["Question"] * (count - 1) + [None]], "logps": [], "replies": []}
        answers["sft"].append(record | sft)
        answers[EVIL].append(record | evil)
    return answers


def make_curve() -> list[dict]:
    """The metrics of a DPO run: validation once, while the policy equals its reference, and nine
    batches."""
    validation = {"valid/loss": math.log(2), "valid/rewards/margins": 0}
    records = [{"step": 0, **validation, "valid/rewards/accuracies": 0}]
    for step in range(9):
        records.append(
            {
                "step": step,
                "loss": 0.7 - step / 100,
                "rewards/margins": step / 10,
                "rewards/accuracies": 0.5 + step / 100,
            }
        )
    return records


def make_frontier() -> list[dict]:
    return [{"T": T, "Q": 10 + T, "B": 1 - T} for T in (0.5, 1.0)]


@pytest.fixture(scope="module")
def results(sample):
    """What write_page gets, with hostile names and texts everywhere."""
    dialogues = make_dialogues(sample)
    row = {"turns": 30, "Q": 17.41, "Q interval": [15.66, 19.17], "B": 0.3186}
    row |= {"preferences": dict.fromkeys(NAMES, 1.5), "confusion": np.eye(9).tolist()}
    systems = {
        "sft": row | {"errors": {EVIL: 3, "none": 1}},
        EVIL: row | {"Q difference": [-0.27, -1.24, 0.66], "errors": {"none": 4}},
        "training frequencies": {"Q": 12.5},
    }
    return {
        "facts": {"model": EVIL, "seeds": [0, 1]},
        "strategies": NAMES,
        "speakers": ["seeker", EVIL],
        "systems": systems,
        "answers": make_answers(dialogues),
        "dialogues": dialogues,
        "curves": {EVIL: make_curve()},
        "frontiers": {EVIL: {"none": make_frontier(), "prior": make_frontier()}},
    }


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """The path of the page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, results)
    return path


def read_cells(html: str) -> list[list[str]]:
    """The text of each row's cells, with "|" for each tag inside a cell."""
    lines = []
    for row in re.findall(r"<tr>(.*?)</tr>", html):
        cells = re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)
        lines.append([re.sub(r"<[^>]*>", "|", cell) for cell in cells])
    return lines


def section_ids(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


# Numbers


def test_the_shares_of_a_phase_are_over_all_dialogues_and_leave_out_what_could_not_be_read():
    shares = phase_shares([["A", "A", "B", "B"], ["B", None, "A"]], ["A", "B"], phases=2)
    # the None is the middle one of three
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    shares = phase_shares([["A"]], ["A", "B"], phases=3)
    # one turn is its dialogue's middle
    np.testing.assert_equal(shares, [[np.nan, np.nan], [1, 0], [np.nan, np.nan]])


def test_scores_show_intervals_and_differences_and_only_columns_that_are_there(results):
    rows = dict(results["systems"])
    rows["sft"] = rows["sft"] | {"empathy": 3.456}
    shown, folded = scores_html({"systems": rows}).split("<details>")
    lines = read_cells(shown)
    assert lines[:3] == [
        ["system", "Q", "B"],
        ["sft", "17.4|15.7 – 19.2|", "0.319"],
        [escape(EVIL), "17.4|15.7 – 19.2||Δ −0.3 (−1.2 … +0.7)|", "0.319"],
    ]
    assert lines[4:] == [["system", "empathy"], ["sft", "3.46"]]
    assert read_cells(folded)[:2] == [["system", "turns"], ["sft", "30"]]
    assert "training frequencies" in shown and "training frequencies" not in folded


def test_scores_of_too_few_dialogues_show_no_interval_and_say_why():
    row = {"Q": 17.41, "Q interval": None, "Q difference": [-0.27, None, None]}
    html = scores_html({"systems": {"sft": {"Q": 17.0, "Q interval": [16, 18]}, "dpo": row}})
    assert read_cells(html)[2] == ["dpo", "17.4|Δ −0.3|"]
    assert html.endswith(f'</div><p class="how">{NO_INTERVAL}</p>')
    html = scores_html({"systems": {"training frequencies": {"Q": 12.5}}})
    assert NO_INTERVAL not in html


def test_confusion_gives_shares_of_each_column():
    """A is chosen three times of the four that people chose it."""
    systems = {"sft": {"confusion": [[3, 0], [1, 4]]}, "training frequencies": {}}
    html = confusion_html({"strategies": ["A", "B"], "systems": systems})
    assert read_cells(html) == [
        ["chosen ↓ human →", "1", "2", "all", "human"],
        ["1 A", "75", "0", "38", "50"],
        ["2 B", "25", "100", "62", "50"],
    ]
    shades = re.findall('class="(shade.*?)" style="--v:(.*?)"', html)
    assert shades[:2] == [("shade same", "0.750"), ("shade", "0.000")]


@pytest.mark.parametrize(
    "preferences, bars",
    [
        ({"A": 0.5, "B": 1.5}, [("0.250", "0.500", "0.500"), ("0.500", "0.750", "0.500")]),
        ({"A": 4}, [("0.250", "1.000", "0.250")]),
    ],
)
def test_bars_of_preferences_start_from_the_ideal(preferences, bars):
    systems = {"sft": {"preferences": preferences}}
    html = preferences_html({"strategies": list(preferences), "systems": systems})
    assert re.findall(r"--from:(.*?);--to:(.*?);--origin:(.*?)\"", html) == bars


def test_errors_are_shares_of_what_was_judged():
    sft = {"errors": {"early emotion shift": 3, "none": 1}}
    html = errors_html({"systems": {"sft": sft, "dpo": {"errors": {"none": 2}}, "x": {}}})
    assert read_cells(html)[1:] == [
        ["early emotion shift", "||75 %|3|", "||0 %|0|"],
        ["none", "||25 %|1|", "||100 %|2|"],
    ]


def test_curves_leave_out_the_accuracy_of_a_policy_that_equals_its_reference(results):
    loss, _, accuracy = re.findall('aria-label="(.*?)"', curves_html(results))
    assert loss == "loss: loss from 0.7 to 0.62; valid/loss from 0.693 to 0.693"
    assert accuracy == "reward accuracy: rewards/accuracies from 0.51 to 0.58"


# The page as a file


def test_a_section_without_content_is_left_out(results, tmp_path, written):
    sections = section_ids(written.read_text())
    systems = {}
    for name, row in results["systems"].items():
        systems[name] = {key: value for key, value in row.items() if key != "errors"}
    less = results | {"systems": systems, "curves": {}, "frontiers": {}}
    write_page(tmp_path / "less.html", less)
    html = (tmp_path / "less.html").read_text()
    kept = [name for name in sections if name not in ("errors", "curves", "frontiers")]
    assert len(kept) == len(sections) - 3
    assert section_ids(html) == kept
    assert re.findall('<a href="#(.*?)"', html) == kept


def test_the_same_results_give_the_same_bytes(results, tmp_path, written):
    write_page(tmp_path / "again.html", results)
    assert (tmp_path / "again.html").read_bytes() == written.read_bytes()


class Reader(HTMLParser):
    """Collects the tags and texts of a page."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.texts = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_from_data_becomes_markup_or_a_placeholder(written):
    reader = Reader()
    reader.feed(written.read_text())
    assert reader.tags.count("script") == 2 and reader.tags.count("title") == 1
    assert "img" not in reader.tags
    (data,) = [text for text in reader.texts if text.startswith("{")]
    shown = json.loads(data)
    assert shown["strategies"] == NAMES and shown["systems"] == ["sft", EVIL]
    first, second, _ = shown["dialogues"]
    assert second["id"] == second["texts"][0] == EVIL
    assert first["systems"][0]["p"][0][:2] == [0.6, 0.333]
    assert EVIL.strip() in [text.strip() for text in reader.texts]  # the fact, as text


def test_the_page_loads_nothing(written):
    html = written.read_text()
    assert "default-src 'none'" in html
    without_scripts = re.sub(r"(?s)<script.*?</script>", "", html)
    assert not re.search(r'\b(?:src|href)="(?!#)|@import|url\((?!#)', without_scripts)


def test_without_matplotlib_it_says_what_to_install(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DescError, match=r"pip install 'desc\[report\]'"):
        write_page(tmp_path / "report.html", results)
    assert not (tmp_path / "report.html").exists()


# The page in a browser

CHROMIUM_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
]
# The page stands untouched in a frame, which may be narrower than any window of Chromium.
DRIVER = """<!doctype html><meta charset="utf-8"><body>
<iframe src="PAGE" width="WIDTH" height="900"></iframe>
<script>
  const frame = document.querySelector("iframe");
  const run = (window, document) => { SCRIPT };
  frame.onload = () => {
    const result = run(frame.contentWindow, frame.contentDocument);
    document.body.dataset.result = encodeURIComponent(JSON.stringify(result));
  };
</script>
"""


def find_chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


@pytest.fixture
def drive(written):
    """drive(script, width): what `script` returns. It is a function's body that sees the `window`
    and `document` of the page, opened at that width."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")

    def run(script: str, width: int = 1280) -> dict:
        html = DRIVER.replace("PAGE", written.name).replace("WIDTH", str(width))
        driver = written.with_name("driver.html")
        driver.write_text(html.replace("SCRIPT", script))
        profile = f"--user-data-dir={written.parent}/profile"
        ended = subprocess.run(
            [chromium, *CHROMIUM_FLAGS, profile, driver.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(unquote(re.search('data-result="(.*?)"', ended.stdout)[1]))

    return run


def test_it_renders_and_a_script_in_an_utterance_stays_text(drive, results):
    shown = drive("""
        const all = (selector) => [...document.querySelectorAll(selector)];
        const text = (selector) => all(selector).map((element) => element.textContent);
        const first = { said: text("article:first-of-type .said"),
          rows: text("article:first-of-type .shares tbody tr"),
          gold: text("article:first-of-type .gold th") };
        const articles = text("article").length;
        document.getElementById("next").click();
        return { first, articles, second: text("article:first-of-type .said"),
          heading: text("#dialogue h3"), title: document.title,
          hacked: window.hacked ?? null, scripts: text("script").length, images: text("img").length,
          options: text("#gold option"),
          charts: all("svg").map((svg) => svg.getBoundingClientRect().height) };
    """)
    turns = results["dialogues"][0]["turns"]
    gold = turns[1]["strategy"]
    assert shown["articles"] == len(turns) // 2
    assert shown["first"]["said"] == [
        f"Seeker{turns[0]['text']}",
        f"Human {EVIL} · {gold}{turns[1]['text']}",
        f"● sft · {gold}{EVIL} 0",
    ]
    assert shown["first"]["gold"] == [gold]
    assert shown["first"]["rows"] == expected_shares(gold)
    assert shown["second"] == [
        f"Seeker{EVIL.strip()}",
        f"Human {EVIL} · {NAMES[-1]}{EVIL}",
        f"● sft · {NAMES[-1]}{EVIL} 0",
    ]
    assert shown["heading"] == [f"Dialogue {EVIL}"]
    assert shown["options"] == ["any", *NAMES]
    assert shown["scripts"] == 2 and shown["images"] == 0 and shown["hacked"] is None
    assert shown["title"].startswith("Strategies and replies")
    assert len(shown["charts"]) == len(NAMES) + 4 and min(shown["charts"]) > 50


def expected_shares(gold: str) -> list[str]:
    """The lines of the first turn's table of shares: "sft" (●) draws gold and, with its second
    seed, Information; the other system (■) draws Question and has no shares."""
    lines = []
    for name, percent in zip(NAMES, [60, 33, *[1] * 7]):
        drawn = [gold, "Information"].count(name)
        sft = f"●{drawn} {percent}" if drawn else f" {percent}"
        other = "■" if name == "Question" else ""
        lines.append(f"{name}{sft}{other}")
    return lines


def expected_turns(results: dict, matches) -> list[list]:
    """[dialogue, turn] of the turns for which matches(gold, the two systems' first predictions)."""
    turns = []
    for number, (sft, other) in enumerate(zip(*results["answers"].values())):
        choices = zip(sft["gold"], sft["predicted"][0], other["predicted"][0])
        turns += [[number, turn] for turn, names in enumerate(choices) if matches(*names)]
    return turns


# (the values that are chosen in the filters, the turns that then match)
FILTERS = [
    ({"gold": 1}, lambda gold, a, b: gold == NAMES[1]),
    ({"gold": 8}, lambda gold, a, b: gold == NAMES[8]),
    ({"said": 0}, lambda gold, a, b: NAMES[0] in (a, b)),
    ({"said": 7}, lambda gold, a, b: NAMES[7] in (a, b)),
    ({"show": "disagree"}, lambda gold, a, b: a != b),
    ({"show": "differ"}, lambda gold, a, b: a != gold or b != gold),
    ({"show": 0}, lambda gold, a, b: a != gold),
    ({"show": 1}, lambda gold, a, b: b != gold),
    (
        {"gold": 2, "show": "disagree", "said": 2},
        lambda gold, a, b: gold == NAMES[2] == a and a != b,
    ),
    ({"gold": 8, "said": 7}, lambda gold, a, b: False),
    ({}, lambda gold, a, b: True),
]


def test_filters_show_the_turns_that_match_and_no_others(drive, results):
    script = """
        const element = (id) => document.getElementById(id);
        const set = (id, value) => {
          element(id).value = value;
          element(id).dispatchEvent(new window.Event("change"));
        };
        return FILTERS.map((filter) => {
          for (const id of ["gold", "said", "show"]) set(id, filter[id] ?? "");
          const turns = [];
          while (!element("previous").disabled) element("previous").click();
          for (let more = element("pick").length > 0; more;) {
            for (const { textContent } of document.querySelectorAll("article h4"))
              turns.push([+element("pick").value, +textContent.split(" ")[1] - 1]);
            more = !element("next").disabled;
            if (more) element("next").click();
          }
          return [turns, element("count").textContent, element("dialogue").textContent !== ""];
        });
    """
    shown = drive(script.replace("FILTERS", json.dumps([chosen for chosen, _ in FILTERS])))
    everything = expected_turns(results, lambda *names: True)
    for (turns, tally, is_filled), (chosen, matches) in zip(shown, FILTERS, strict=True):
        expected = expected_turns(results, matches)
        dialogues = len({number for number, _ in expected})
        assert turns == expected, chosen
        matching = f"{len(expected)} of {len(everything)} turns match"
        assert tally == f"{matching}, in {dialogues} of 3 dialogues."
        assert is_filled == bool(expected)
        is_extreme = chosen in ({}, {"gold": 8, "said": 7})
        assert 0 < len(expected) < len(everything) or is_extreme


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_never_scrolls_sideways(drive, width):
    content, visible = drive(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth];", width
    )
    assert content <= visible <= width
    assert visible > width - 30  # the frame does have that width
