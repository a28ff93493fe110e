"""Talking to a run: both answers are those of a test, and what is set counts."""

import io
import itertools
import sys

import pytest

from corrsteer_pl.commands.chat import Talk, chat
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.runs.loading import load_fit


def typed(outcome):
    return outcome.prompt.removeprefix("Request: ").removesuffix("\nResponse:")


def last(talk, outcome):
    *_, answers = talk.answers(typed(outcome), 8)
    return answers


def test_answers_are_those_of_the_test(refusing):
    folder, module = refusing
    talk = Talk(load_fit(folder))
    for outcome in module.outcomes[:8]:
        assert last(talk, outcome) == [outcome.answer_baseline, outcome.answer_steered]


def test_answers_grow_token_by_token(refusing):
    folder, module = refusing
    parts = list(Talk(load_fit(folder)).answers(typed(module.outcomes[0]), 8))
    assert len(parts) > 2
    for before, after in itertools.pairwise(parts):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_strength_and_features_can_be_set(refusing):
    folder, module = refusing
    talk = Talk(load_fit(folder))
    outcome = next(o for o in module.outcomes if o.answer_baseline != o.answer_steered)
    assert "Steering 0 times as strongly" in talk.command("/scale 0")
    assert last(talk, outcome) == [outcome.answer_baseline] * 2
    talk.command("/scale 1")
    count = len(module.selection.features)
    assert all(f"{f.site}/{f.index}" in talk.command("/features") for f in module.selection.features)
    for number in range(1, count + 1):
        assert f"{number}. " in talk.command(f"/off {number}")
    assert last(talk, outcome) == [outcome.answer_baseline] * 2
    for number in range(1, count + 1):
        talk.command(f"/on {number}")
    assert last(talk, outcome) == [outcome.answer_baseline, outcome.answer_steered]
    mistakes = {
        "/scale much": "/scale takes a number", "/scale nan": "/scale takes a number", "/what": "there is no /what",
        "/off": "nothing is no number", "/off 99": "99 is no number of a feature",
    }  # fmt: skip
    for line, sentence in mistakes.items():
        with pytest.raises(UserError, match=sentence):
            talk.command(line)


def test_pipes_get_plain_lines(refusing, monkeypatch, capsys):
    folder, module = refusing
    changed = next(o for o in module.outcomes if o.answer_baseline != o.answer_steered)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed(changed)}\n\n/scale\n/nothing\n"))
    chat(folder, max_new_tokens=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"unsteered: {changed.answer_baseline.strip()}", f"steered: {changed.answer_steered.strip()}"]
    assert "Steering 1 times as strongly as the run." in lines
    assert any("there is no /nothing" in line for line in lines)


def test_what_is_no_text_is_read_all_the_same(refusing, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"A hen \xff\xfe\n/scale\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    chat(refusing[0], max_new_tokens=2)
    assert "Steering 1 times as strongly as the run." in capsys.readouterr().out


def test_an_answer_can_be_stopped_and_the_talk_goes_on(refusing, monkeypatch, capsys):
    real, asked = Talk.answers, []

    def stopped_once(talk, text, max_new_tokens):
        asked.append(text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(talk, text, max_new_tokens)

    monkeypatch.setattr(Talk, "answers", stopped_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    chat(refusing[0], max_new_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["stopped", "unsteered", "steered"]


def test_a_prompt_has_to_leave_room_for_an_answer(refusing, monkeypatch):
    talk = Talk(load_fit(refusing[0]))
    length = len(talk.fit.prompt_ids([talk.fit.asked("A hen")]))
    config = talk.fit.method.llm.config
    monkeypatch.setattr(config, "max_position_embeddings", length)
    # The last token that is written is not read.
    assert len(list(talk.answers("A hen", 8))) == 1
    monkeypatch.setattr(config, "max_position_embeddings", length - 1)
    with pytest.raises(UserError, match=f"has {length} tokens, but demo reads at most {length - 1}"):
        list(talk.answers("A hen", 8))


def test_a_folder_without_a_fit_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is no run: it has no last.ckpt. Give the folder of a fit"):
        chat(tmp_path)
