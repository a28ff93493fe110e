"""Rewards on the awkward cases."""

from decimal import Decimal

import pytest

from corrsteer_pl.errors import UserError
from corrsteer_pl.rewards import Reward, make_reward, text
from corrsteer_pl.rewards.judges import RefusalReward, SimilarityReward, _refusing_label


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("16 - 3 - 4 = 9 eggs.\n#### 18", "18"),
        ("#### 1,234.50", "1234.5"),
        ("#### $1,234.50 a year", "1234.5"),
        ("#### \u22127", "-7"),
        ("#### -7", "-7"),
        ("#### -$7", "-7"),
        ("It costs 5, then 8.", "8"),
        ("The answer is 5-4", "4"),
        ("from (3)-2", "2"),
        ("#### 18\n\nQ: Next?\nA: #### 99", "18"),
        ("first 12 #### none", "12"),
        ("a third: .5", ".5"),
        ("1,2,3", "3"),
        ("12,345,678 in all", "12345678"),
        ("10.", "10"),
        ("5%", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_final_numbers(response, number):
    assert text.final_number(response) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        ("#### 1,234.50", "1234.5", 1), ("#### 1234", "1234.5", 0), ("\u22127", "-7", 1), ("7", "-7", 0),
        ("none", "7", 0),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(response, gold, reward):
    assert text.number(response, gold) == reward


@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I cannot help with that.", True), (" I\u2019m sorry, but no.", True), ("As an AI, I do not do that.", True),
        ("Sure! First, sorry for the delay: I cannot wait to help.", False), ("You cannot kill a process so.", False),
        ("", False), ("I can help. I won't judge.", False), ("Unfortunately, I cannot do that.", True),
        ("**I cannot** help.", True), ("No, I can't.", True), ("I apologize, but no.", True), ("I must refuse.", True),
        ("I'm really sorry.", True), ("I cannot wait to help!", False), ("As an AIDS researcher, I know.", False),
    ],
)  # fmt: skip
def test_refusals_begin_the_answer(response, refuses):
    assert text.is_refusal(response) is refuses


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        ("Step 1 ... A looks right, but the answer is (C).", "C", 1),
        ("The answer is A. No: the answer is B.", "B", 1),
        ("Answer: D", "D", 1),
        ("The answer is Berlin.", "B", 0),
        ("A", "A", 0),
        ("The answer is **B**.", "B", 1),
        ("The answer is $\\boxed{B}$", "B", 1),
        ("The answer is:\nB", "B", 1),
        ("The answer is option B", "B", 1),
        ("The answer is A. This answer a person could give.", "A", 1),
        ("The answer is B, the answer I give.", "B", 1),
    ],
)
def test_the_last_letter_called_the_answer_counts(response, gold, reward):
    assert text.final_letter(response, gold) == reward


def test_match_forgives_case_articles_and_punctuation_and_what_follows():
    assert text.match(" the Eiffel Tower.\nQuestion: And", "Eiffel tower") == 1
    assert text.match("Eiffel", "Eiffel tower") == 0
    assert text.token_f1("the tall tower", "Eiffel tower") == 0.5
    assert text.token_f1("", "Eiffel") == 0
    assert text.match("3.5", "35") == text.match("-5", "5") == text.match("", "A") == text.match("", "!!!") == 0
    assert text.match("A", "A") == text.match(" the 3.5.", "3.5") == 1


def halves(response, gold):
    return 0.5


def nothing_at_all(response, gold):
    return None


class Longer(Reward):
    """A reward as a user writes it."""

    def __call__(self, texts, golds):
        return [float(len(t) > len(g)) for t, g in zip(texts, golds, strict=True)]


def test_rewards_of_the_users_own():
    assert make_reward("tests.tasks.test_rewards.halves")(["a"], ["b"]) == [0.5]
    longer = make_reward("tests.tasks.test_rewards.Longer")
    assert longer(["abc", ""], ["b", "c"]) == [1, 0]
    assert longer.name == "tests.tasks.test_rewards.Longer"
    with pytest.raises(UserError, match="tests.tasks.test_rewards.nothing_at_all returned None; it has to be a number"):
        make_reward("tests.tasks.test_rewards.nothing_at_all")(["a"], ["b"])
    for path in ("tests.tasks.test_rewards.nothing", "no.such.module", "nix", "tests.tasks.test_rewards.Decimal"):
        with pytest.raises(UserError, match="choose one of exact"):
            make_reward(path)


def test_a_judge_that_cannot_be_loaded_is_an_error(tmp_path):
    for reward in (RefusalReward(str(tmp_path / "none")), SimilarityReward(str(tmp_path / "none"))):
        with pytest.raises(UserError, match=r"the reward model .* could not be loaded .* Set data.task_args.judge to"):
            reward.load("cpu")
    with pytest.raises(UserError, match="threshold is 3; it is a similarity between 0 and 1"):
        SimilarityReward(threshold=3)


@pytest.mark.parametrize(
    ("labels", "refusing"),
    [
        (["NORMAL", "REJECTION"], "REJECTION"), (["Non-refusal", "Refusal"], "Refusal"),
        (["Refused", "Answered"], "Refused"), (["NOT_REJECTED", "REJECTED"], "REJECTED"),
        (["LABEL_0", "LABEL_1"], "LABEL_1"),
    ],
)  # fmt: skip
def test_the_label_of_a_refusal_is_recognised(labels, refusing):
    assert _refusing_label("x", labels) == refusing


@pytest.mark.parametrize("labels", [["harmful", "safe"], ["LABEL_0"], ["soft refusal", "hard refusal", "answer"]])
def test_labels_that_leave_it_open_are_refused(labels):
    with pytest.raises(UserError, match="of which it is not clear which one is a refusal"):
        _refusing_label("x", labels)


def test_prefixes_and_match_need_no_model():
    assert RefusalReward()(["Sorry.", "Sorry."], ["refuse", "comply"]) == [1, 0]
    assert SimilarityReward("match")(["Paris"], ["paris"]) == [1]
