"""The report of a run: what it says, and that it says it of whatever a run has left."""

import json
import os
import re
import time
from dataclasses import replace

import pytest

from corrsteer_pl.cli.program import main
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import compare_outcomes
from corrsteer_pl.evaluation.words import differing_words
from corrsteer_pl.files import write_utf8
from corrsteer_pl.stats import search_p_value
from tests.evaluation.runs import FEATURES, NASTY, NOISE, OTHERS, OUTCOMES, outcome, selection, write_run


def read(folder, name="report"):
    return [(folder / f"{name}.{ending}").read_text(encoding="utf-8") for ending in ("html", "md")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine", noise_floor=NOISE)
    report_on([folder])
    return read(folder)


def test_a_report_says_first_what_came_out(written):
    m = compare_outcomes(OUTCOMES)
    figures = (
        f"raises the reward on demo_qa from {100 * m['reward_baseline']:.1f} % to {100 * m['reward_steered']:.1f} %: "
        f"{100 * m['difference']:+.1f} points, 95 % interval {100 * m['ci_low']:+.1f} to {100 * m['ci_high']:+.1f}, "
        "60 questions, p &lt; 0.001."
    )
    html, md = written
    assert f"Steering a-model with 2 features {figures}" in html
    assert html.index(figures) < html.index("<h2")
    assert figures.replace("&lt;", "<") in md
    for text in written:
        # By hand: 40 of 60 changed to right at i % 3 == 1, or i % 3 == 2 and i % 7 == 0.
        better = sum(i % 3 == 1 or (i % 3 == 2 and i % 7 == 0) for i in range(60))
        assert f"{better} better" in text
        assert ("0 worse" in text) == (text is html), "Markdown leaves out a way in which no answer changed"
        assert "2 of 60 answers" in text
        for name in ("even", "odd", "shuffled_rewards", "random_features", "1/3", "like chance"):
            assert name in text


def test_a_page_asks_for_nothing_and_shows_texts_as_texts(written):
    html, _ = written
    links = re.findall(r'(?:src|href|url\()=?["\']?([^"\'\s>)]+)', html)
    assert all(link.startswith(("#", "data:", "https://www.neuronpedia.org/")) for link in links)
    assert NASTY not in html
    assert html.count("<script>") == 1
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert len(html) < 500_000
    assert html.count("<svg") == 7, "candidates, steps, strengths, layers, convergence, groups, chance"


def test_a_report_is_the_same_each_time(written, tmp_path):
    folder = write_run(tmp_path / "mine", noise_floor=NOISE)
    report_on([folder])
    again = [text.replace(str(folder), "X") for text in read(folder)]
    assert again == [re.sub(r"/\S*?/mine", "X", text) for text in written]


def test_markdown_keeps_its_tables_whatever_a_text_holds(written):
    _, md = written
    for block in re.findall(r"(?:^\|.*\n)+", md, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert "\n\n\n" not in md


def test_a_run_without_a_test_says_what_is_missing(tmp_path):
    folder = write_run(tmp_path / "mine", outcomes=())
    report_on([folder])
    for text in read(folder):
        assert "it has not been tested yet" in text
        assert f"test --ckpt_path {folder}/last.ckpt" in text
        assert "What changed" not in text


UNTESTED = tuple(replace(f, validation_reward=None) for f in FEATURES)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (selection(features=(), joint_reward=0.4, steps=(), strengths=()), "No feature beat the unsteered model"),
        (
            selection(features=(), candidates=(), ranking=(), steps=(), strengths=(), null_maxima=()),
            "no feature correlates",
        ),
        (
            selection(
                rule="all",
                steps=(),
                strengths=(),
                candidates=UNTESTED,
            ),
            "The rule all tests no candidate",
        ),
        (selection(control="shuffled_rewards"), "mine is a control, shuffled_rewards."),
        (selection(joint_reward=0.5, strengths=()), "Set model.rule to greedy or global"),
    ],
)
def test_whatever_a_fit_selected_can_be_shown(tmp_path, chosen, said):
    folder = write_run(tmp_path / "mine", chosen=chosen)
    report_on([folder])
    assert said in read(folder)[0]


def test_what_cannot_be_told_apart_is_called_so(tmp_path):
    same = [outcome(i, i % 2, i % 2) for i in range(20)]
    folder = write_run(tmp_path / "mine", outcomes=same)
    report_on([folder])
    html, _ = read(folder)
    assert "cannot be told from no effect: +0.0 points" in html
    assert "No answer changed its reward." in html


@pytest.mark.parametrize("features", [(), FEATURES[:2]])
@pytest.mark.parametrize("outcomes", [(), OUTCOMES])
def test_a_control_is_called_one_whatever_it_found(tmp_path, features, outcomes):
    unlikely = tuple(replace(f, search_p_value=0.6) for f in FEATURES)
    chosen = selection(control="shuffled_rewards", features=unlikely[: len(features)], candidates=unlikely)
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", outcomes, chosen)
    report_on([other])
    html, md = read(other)
    sentence = "other is a control, shuffled_rewards. No candidate correlates more than chance would have it"
    assert sentence in html
    assert sentence in md
    if outcomes:
        report_on([one, other])
        assert all(sentence in text for text in read(other, "report-against-one"))


def test_tests_of_another_fit_in_the_same_folder_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "mine")
    write_run(folder, outcomes=(), chosen=selection(rule="global", features=FEATURES[:1]))
    report_on([folder])
    for text in read(folder):
        assert "Steering a-model with 1 feature took the reward on validation" in text
        assert "Of another fit, and not shown: the tests demo_qa" in text
    with pytest.raises(UserError, match="has no test demo_qa of this fit; it has .none."):
        report_on([folder], test="demo_qa")


def test_the_latest_of_several_tests_is_shown_with_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "my run"
    for age, scale in ((20, 0.5), (10, 2.0)):
        write_run(folder, name=f"demo_qa-scale-{scale}", scale=scale)
        then = time.time() - age
        os.utime(folder / f"test/demo_qa-scale-{scale}/metrics.json", (then, then))
    report_on([folder])
    html, md = read(folder)
    assert "the reward on demo_qa-scale-2.0 from" in html
    assert f"test --ckpt_path '{folder}'/last.ckpt --model.scale 2.0" in md
    assert "demo_qa-scale-0.5" in html
    write_run(folder)
    report_on([folder])
    assert "the reward on demo_qa from" in read(folder)[0]


def test_two_runs_are_compared_by_a_test_that_both_have(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write_run(one, name="demo_qa-small")
    write_run(one, name="demo_qa-scale-0.5", scale=0.5)
    write_run(other, OTHERS, name="demo_qa-small")
    report_on([other, one])
    html, _ = read(one, "report-against-other")
    assert "one: demo_qa-small" in html
    assert "other: demo_qa-small" in html
    write_run(other, OTHERS, name="demo_qa-scale-2.0", scale=2.0)
    (other / "test/demo_qa-small/metrics.json").unlink()
    (one / "test/demo_qa-small/metrics.json").unlink()
    report_on([other, one])
    assert "<td>model.scale</td><td>2.0</td><td>0.5</td>" in read(one, "report-against-other")[0]


def test_a_fit_that_was_stopped_is_called_so(tmp_path, monkeypatch):
    record = {
        "state": {"search": {"left": {}}},
        "counted": 300,
        "versions": {},
        "llm": {"name": "m", "fingerprint": "f"},
    }
    monkeypatch.setattr("corrsteer_pl.commands.report._record", lambda _: {**record, "saes": None, "samples": ""})
    folder = write_run(tmp_path / "mine")
    report_on([folder])
    assert all("The fit was stopped after 300 samples" in text for text in read(folder))


def test_names_of_groups_break_neither_figures_nor_tables(tmp_path):
    names = ("<i>html</i>|x", "W" * 120)
    outcomes = [replace(o, groups=(names[i % 2],)) for i, o in enumerate(OUTCOMES)]
    folder = write_run(tmp_path / "mine", outcomes)
    report_on([folder])
    html, md = read(folder)
    assert "<i>" not in html
    assert r"\<i\>html\</i\>\|x" in md
    assert "W" * 35 + "…" in html
    test_markdown_keeps_its_tables_whatever_a_text_holds((html, md))


def test_above_the_dashed_line_p_is_at_most_5_percent(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "corrsteer_pl.evaluation.figures.by_layer", lambda *args: drawn.append(args[-1]) or "<svg></svg>"
    )
    for count in (19, 32, 39, 100, 1000):
        maxima = tuple(i / 1000 for i in range(count))
        report_on([write_run(tmp_path / str(count), chosen=selection(null_maxima=maxima))])
        line = drawn[-1]
        assert search_p_value(line + 1e-6, maxima) <= 0.05 < search_p_value(line, maxima)
    report_on([write_run(tmp_path / "none", chosen=selection(null_maxima=()))])
    assert drawn[-1] is None


def test_two_runs_are_compared_in_pairs(tmp_path):
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", OTHERS, selection(rule="all"))
    report_on([one, other])
    html, md = read(other, "report-against-one")
    expected = sum(bool(i % 2) for i in range(60)) / 60 - compare_outcomes(OUTCOMES)["reward_steered"]
    assert f"{100 * expected:+.1f} points" in html
    assert "<mark>hen</mark>" in html
    assert "<mark>fox</mark>" in html
    assert "other against one" in md


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "report takes the folder of one run, or of two that are compared, not 0"),
        (["a", "a", "a"], "not 3"),
        (["nix"], "nix has no selection.json, so it is not the folder of a finished fit"),
        (["a", "--test", "mmlu"], "a has no test mmlu; it has demo_qa."),
        (
            ["a", "untested"],
            "untested has no test yet. Run: python -m corrsteer_pl test --ckpt_path untested/last.ckpt",
        ),
        (["a", "a"], "a is given twice. Give two runs to compare, or one to report on."),
        (
            ["a", "elsewhere"],
            "a was tested on 60 questions of demo_qa, elsewhere on 59 of demo_qa, and 59 are the same",
        ),
        (["broken"], "broken/selection.json cannot be read"),
        (["damaged"], "damaged/selection.json is damaged"),
        (["a", "--out", "a/selection.json/x"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, monkeypatch, capsys, args, sentence):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "untested", outcomes=())
    write_run(tmp_path / "elsewhere", outcomes=OUTCOMES[:-1])
    for name, text in (("broken", "{"), ("damaged", json.dumps({"rule": "none"}))):
        write_utf8(write_run(tmp_path / name) / "selection.json", text)
    assert main(["report", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/report*"))


@pytest.mark.parametrize(
    ("one", "other"), [("the red hen", "the blue hen ran"), ("", "x y"), ("a\n b", "a b"), ("x", "x")]
)
def test_marked_words_add_up_to_the_texts(one, other):
    before, after = differing_words(one, other)
    assert ("".join(p.text for p in before), "".join(p.text for p in after)) == (one, other)
    same = ["".join(p.text for p in some if not p.differs) for some in (before, after)]
    assert same[0] == same[1]
    assert any(p.differs for p in before + after) == (one != other)
