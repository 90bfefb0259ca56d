"""The report: its numbers, that no data can become markup, and, in headless Chromium, that it
renders and filters."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from desc import DescError
from desc.esconv import Dialogue
from desc.evaluation import page
from desc.evaluation.figures import phase_shares
from desc.strategies import ESCONV

pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'desc[report]'")

EVIL = (
    '</script><script>window.hacked = 1; document.title = "hacked"</script><!--data--> <img src=x'
    ' onerror=window.hacked=1> & "q" \u2028'
)
NAMES = [*ESCONV, f"$x_1$ {EVIL}"]


def turns_of(dialogue: Dialogue) -> list[dict]:
    return [
        {"speaker": turn.speaker, "text": turn.text, "strategy": turn.strategy}
        for turn in dialogue.turns
    ]


@pytest.fixture(scope="module")
def results(sample):
    """Three dialogues, two planners; the first is right but once in the first seed, the second
    writes no replies and asks always."""
    dialogues = [{"id": d.id, "turns": turns_of(d)} for d in sample[:3]]
    dialogues[1] = {"id": EVIL, "turns": dialogues[1]["turns"]}
    dialogues[1]["turns"][0]["text"] = dialogues[1]["turns"][1]["text"] = EVIL
    dialogues[1]["turns"][1]["strategy"] = NAMES[-1]
    answers = {"sft": [], EVIL: []}
    for dialogue in dialogues:
        gold = [turn["strategy"] for turn in dialogue["turns"][1::2]]
        record = {
            "dialogue": dialogue["id"],
            "gold": gold,
            "human": [turn["text"] for turn in dialogue["turns"][1::2]],
        }
        logps = np.log(
            np.tile(np.r_[0.6, 0.33333, np.full(7, 0.06667 / 7)], (len(gold), 1))
        ).tolist()
        said = [[*gold[:-1], "Others"], ["Information"] * len(gold)]
        answers["sft"].append(
            record
            | {
                "predicted": said,
                "logps": logps,
                "replies": [f"{EVIL} {t}" for t in range(len(gold))],
            }
        )
        answers[EVIL].append(
            record
            | {"predicted": [["Question"] * (len(gold) - 1) + [None]], "logps": [], "replies": []}
        )
    curves = [
        {
            "step": 0,
            "valid/loss": math.log(2),
            "valid/rewards/margins": 0,
            "valid/rewards/accuracies": 0,
        }
    ]
    curves += [
        {
            "step": n,
            "loss": 0.7 - n / 100,
            "rewards/margins": n / 10,
            "rewards/accuracies": 0.5 + n / 100,
        }
        for n in range(9)
    ]
    row = {"turns": 30, "Q": 17.41, "Q interval": [15.66, 19.17], "B": 0.3186}
    row |= {"preferences": dict.fromkeys(NAMES, 1.5), "confusion": np.eye(9).tolist()}
    systems = {
        "sft": row | {"errors": {EVIL: 3, "none": 1}},
        EVIL: row | {"Q difference": [-0.27, -1.24, 0.66], "errors": {"none": 4}},
    }
    return {
        "facts": {"model": EVIL, "seeds": [0, 1]},
        "strategies": NAMES,
        "systems": systems | {"training frequencies": {"Q": 12.5}},
        "answers": answers,
        "dialogues": dialogues,
        "curves": {EVIL: curves},
    }


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write_page(path, results)
    return path


def cells(html: str) -> list[list[str]]:
    """The text of a table's cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [
        [re.sub(r"<[^>]*>", "|", text) for text in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_the_shares_of_a_phase_are_over_all_dialogues_and_leave_out_what_could_not_be_read():
    shares = phase_shares([["A", "A", "B", "B"], ["B", None, "A"]], ["A", "B"], phases=2)
    # the None is the middle one of three
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    shares = phase_shares([["A"]], ["A", "B"], phases=3)
    # one turn is its dialogue's middle
    np.testing.assert_equal(shares, [[np.nan, np.nan], [1, 0], [np.nan, np.nan]])


def test_scores_show_intervals_and_differences_and_only_columns_that_are_there(results):
    rows = results["systems"] | {"sft": results["systems"]["sft"] | {"empathy": 3.456}}
    tables = page.scores({"systems": rows}).split("<details>")
    assert cells(tables[0])[:3] == [
        ["system", "Q", "B"],
        ["sft", "17.4|15.7 – 19.2|", "0.319"],
        [page.escape(EVIL), "17.4|15.7 – 19.2||Δ −0.3 (−1.2 … +0.7)|", "0.319"],
    ]
    assert cells(tables[0])[4:] == [["system", "empathy"], ["sft", "3.46"]] and cells(tables[1])[
        :2
    ] == [["system", "turns"], ["sft", "30"]]
    assert "training frequencies" in tables[0] and "training frequencies" not in tables[1]


def test_confusion_gives_shares_of_each_column():
    # A is chosen three times, where people chose it four times
    row = {"confusion": [[3, 0], [1, 4]]}
    html = page.confusion(
        {"strategies": ["A", "B"], "systems": {"sft": row, "training frequencies": {}}}
    )
    assert cells(html)[0] == ["chosen ↓ human →", "1", "2", "all", "human"]
    assert cells(html)[1:] == [["1 A", "75", "0", "38", "50"], ["2 B", "25", "100", "62", "50"]]
    assert re.findall('class="(shade.*?)" style="--v:(.*?)"', html)[:2] == [
        ("shade same", "0.750"),
        ("shade", "0.000"),
    ]


def test_bars_start_from_the_ideal_and_errors_are_shares_of_what_was_judged():
    for values, expected in (
        ({"A": 0.5, "B": 1.5}, ["0.250 0.500 0.500", "0.500 0.750 0.500"]),
        ({"A": 4}, ["0.250 1.000 0.250"]),
    ):
        html = page.preferences(
            {"strategies": list(values), "systems": {"sft": {"preferences": values}}}
        )
        assert [
            " ".join(found)
            for found in re.findall(r"--from:(.*?);--to:(.*?);--origin:(.*?)\"", html)
        ] == expected
    html = page.errors(
        {
            "systems": {
                "sft": {"errors": {"early emotion shift": 3, "none": 1}},
                "dpo": {"errors": {"none": 2}},
                "x": {},
            }
        }
    )
    assert cells(html)[1:] == [
        ["early emotion shift", "||75 %|3|", "||0 %|0|"],
        ["none", "||25 %|1|", "||100 %|2|"],
    ]


def test_curves_leave_out_the_accuracy_of_a_policy_that_equals_its_reference(results):
    drawn = re.findall('aria-label="(.*?)"', page.curves(results))
    assert drawn[0] == "loss: loss from 0.7 to 0.62; valid/loss from 0.693 to 0.693"
    assert drawn[2] == "reward accuracy: rewards/accuracies from 0.51 to 0.58" and len(drawn) == 3


def test_a_section_without_content_is_left_out(results, tmp_path, written):
    whole = re.findall(r'<section id="(\w+)"', written.read_text())
    systems = {
        name: {key: value for key, value in row.items() if key != "errors"}
        for name, row in results["systems"].items()
    }
    page.write_page(tmp_path / "less.html", results | {"systems": systems, "curves": {}})
    less = (tmp_path / "less.html").read_text()
    assert set(whole) - set(re.findall(r'<section id="(\w+)"', less)) == {"errors", "curves"}
    assert re.findall('<a href="#(.*?)"', less) == [
        name for name in whole if name not in ("errors", "curves")
    ]


def test_the_same_results_give_the_same_bytes(results, tmp_path, written):
    page.write_page(tmp_path / "again.html", results)
    assert (tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_nothing_from_data_becomes_markup_or_a_placeholder(written):
    tags, texts, reader = [], [], HTMLParser()
    reader.handle_starttag, reader.handle_data = (
        lambda tag, attributes: tags.append(tag),
        texts.append,
    )
    reader.feed(written.read_text())
    assert tags.count("script") == 2 and tags.count("title") == 1 and "img" not in tags
    (text,) = [text for text in texts if text.startswith("{")]
    found = json.loads(text)
    assert found["strategies"] == NAMES and found["systems"] == ["sft", EVIL]
    assert found["dialogues"][1]["id"] == found["dialogues"][1]["texts"][0] == EVIL
    assert found["dialogues"][0]["systems"][0]["p"][0][:2] == [0.6, 0.333]
    assert EVIL.strip() in [text.strip() for text in texts]  # the fact, as text


def test_the_page_loads_nothing(written):
    text = written.read_text()
    assert not re.search(
        r'\b(?:src|href)="(?!#)|@import|url\((?!#)', re.sub(r"(?s)<script.*?</script>", "", text)
    )
    assert "default-src 'none'" in text


def test_without_matplotlib_it_says_what_to_install(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DescError, match=r"pip install 'desc\[report\]'"):
        page.write_page(tmp_path / "report.html", results)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def drive(written):
    """drive(script, width): what `script` returns, a function's body run with the opened page's
    `window` and `document` at that width."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not chromium:
        pytest.skip("no Chromium: apt-get install chromium")

    def run(script: str, width: int = 1280) -> dict:
        # The page stands untouched in a frame, which may be narrower than any window of Chromium.
        driver = written.with_name("driver.html")
        driver.write_text(
            f'<!doctype html><meta charset="utf-8"><body><iframe src="{written.name}"'
            f' width="{width}" height="900"></iframe><script>const frame ='
            " document.querySelector('iframe');frame.onload = () => { const run = (window,"
            f" document) => {{ {script} }};document.body.dataset.found ="
            " encodeURIComponent(JSON.stringify(run(frame.contentWindow, frame.contentDocument)));"
            " };</script>"
        )
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
        ]
        flags += [
            f"--user-data-dir={written.parent}/profile",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]
        ended = subprocess.run(
            [chromium, *flags, driver.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert not [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(unquote(re.search('data-found="(.*?)"', ended.stdout)[1]))

    return run


def test_it_renders_and_a_script_in_an_utterance_stays_text(drive, results):
    found = drive("""
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
    dialogue = results["dialogues"][0]
    assert found["articles"] == len(dialogue["turns"]) // 2
    gold = dialogue["turns"][1]["strategy"]
    assert found["first"]["said"] == [
        f"Seeker{dialogue['turns'][0]['text']}",
        f"Human supporter · {gold}{dialogue['turns'][1]['text']}",
        f"● sft · {gold}{EVIL} 0",
    ]
    assert found["first"]["gold"] == [gold]
    expected = []
    for name, p in zip(NAMES, [60, 33, *[1] * 7]):
        drawn = (name == gold) + (name == "Information")
        expected.append(
            f"{name}{f'●{drawn}' if drawn else ''} {p}{'■' if name == 'Question' else ''}"
        )
    assert found["first"]["rows"] == expected
    assert found["second"] == [
        f"Seeker{EVIL.strip()}",
        f"Human supporter · {NAMES[-1]}{EVIL}",
        f"● sft · {NAMES[-1]}{EVIL} 0",
    ]
    assert found["heading"] == [f"Dialogue {EVIL}"]
    assert found["options"] == ["any", *NAMES]
    assert (found["scripts"], found["images"], found["hacked"]) == (2, 0, None) and found[
        "title"
    ].startswith("Support strategies")
    assert len(found["charts"]) == len(NAMES) + 3 and min(found["charts"]) > 50


def expected_turns(results: dict, wanted) -> list[list]:
    """[dialogue, turn] for which wanted(gold, the two systems' first predictions)."""
    found = []
    for n, (a, b) in enumerate(zip(*results["answers"].values())):
        found += [
            [n, t]
            for t, said in enumerate(zip(a["gold"], a["predicted"][0], b["predicted"][0]))
            if wanted(*said)
        ]
    return found


def test_filters_show_the_turns_that_match_and_no_others(drive, results):
    filters = [
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
    found = drive(
        """
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
    """.replace("FILTERS", json.dumps([chosen for chosen, _ in filters]))
    )
    everything = expected_turns(results, filters[-1][1])
    for (turns, count, shown), (chosen, wanted) in zip(found, filters, strict=True):
        expected = expected_turns(results, wanted)
        dialogues = len({n for n, _ in expected})
        assert turns == expected, chosen
        assert (
            count
            == f"{len(expected)} of {len(everything)} turns match, in {dialogues} of 3 dialogues."
        )
        assert shown == bool(expected)
        assert 0 < len(expected) < len(everything) or chosen in ({}, {"gold": 8, "said": 7})


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_never_scrolls_sideways(drive, width):
    found = drive(
        "const box = document.documentElement; return [box.scrollWidth, box.clientWidth,"
        " box.innerHTML.length];",
        width,
    )
    assert found[0] <= found[1] <= width and found[1] > width - 30
