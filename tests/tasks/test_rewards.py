"""Rewards on the awkward cases."""

import sys
from decimal import Decimal

import pytest

from corrsteer_pl.errors import UserError
from corrsteer_pl.rewards import Reward, make_reward, numbers, reward, text
from corrsteer_pl.rewards.judges import RefusalReward, SimilarityReward, _refusing_label
from corrsteer_pl.tasks import Example, Task, make_task, rewards_of


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
    assert numbers.final_number(response) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        ("#### 1,234.50", "1234.5", 1), ("#### 1234", "1234.5", 0), ("\u22127", "-7", 1), ("7", "-7", 0),
        ("none", "7", 0),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(response, gold, reward):
    assert numbers.number(response, gold) == reward


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


@reward
def halves(response, gold):
    return 0.5


@reward
def nothing_at_all(response, gold):
    return None


@reward
def of_one(response):
    return 1


def undeclared(response, gold):
    return 1


@reward
def fails_on_x(response, gold):
    return 1 / (response != "x")


@reward
def ends_on_x(response, gold):
    return sys.exit("bye") if response == "x" else 1


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
    for path in ("tests.tasks.test_rewards.nothing", "no.such.module", "nix", "..", ".x.y", "x.", "a..b", ""):
        with pytest.raises(UserError, match="choose one of exact"):
            make_reward(path)


class NeedsMore(Longer):
    def __init__(self, more):
        pass


@pytest.mark.parametrize("path", ["os.popen", "sys.exit", "subprocess.Popen", "builtins.print", f"{__name__}.Decimal",
                                  f"{__name__}.undeclared", "corrsteer_pl.rewards.reward"])  # fmt: skip
def test_only_what_declares_itself_is_called_by_its_import_path(path):
    with pytest.raises(
        UserError, match=r"is not declared as a reward. Derive a class from corrsteer_pl.rewards.Reward, or"
    ):
        make_reward(path)


def test_rewards_that_cannot_be_called_are_refused_before_a_fit():
    with pytest.raises(UserError, match=r"of_one cannot be called with a response and a gold text \(too many pos"):
        make_reward(f"{__name__}.of_one")
    with pytest.raises(UserError, match=r"NeedsMore cannot be made without arguments \(TypeError: .*'more'"):
        make_reward(f"{__name__}.NeedsMore")
    with pytest.raises(UserError, match=r"Reward cannot be made without arguments \(TypeError: .*abstract"):
        make_reward("corrsteer_pl.rewards.Reward")


@pytest.mark.parametrize(
    ("name", "said"),
    [("fails_on_x", r"ZeroDivisionError: division by zero, .*test_rewards.py:\d+"), ("ends_on_x", "SystemExit: bye")],
)
def test_a_reward_that_fails_names_itself_and_the_sample(name, said):
    task = make_task("generic", {"answer": "a", "reward": f"{__name__}.{name}"})
    examples = [task.example({"prompt": p, "a": "y"}, f"row {i}") for i, p in enumerate("pqr")]
    assert rewards_of(task, ["a", "b", "c"], examples) == [1, 1, 1]
    with pytest.raises(UserError, match=rf"the reward {__name__}.{name} of the response to row 1 failed \({said}"):
        rewards_of(task, ["a", "x", "c"], examples)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([1.0], "gave 1 rewards for 2 responses; give one for each, in a list"),
        (0.5, "gave float for 2 responses"),
        ([1, float("nan")], "the reward of b is nan; a task's rewards lie between 0 and 1"),
        ([1, -0.1], "the reward of b is -0.1"),
        ([1, "1"], "the reward of b is '1'"),
    ],
)
def test_rewards_are_one_number_for_each_response(given, sentence):
    class Given(Task):
        def example(self, row, id):
            return Example(id, "", "")

        def reward(self, texts, examples):
            return given

    with pytest.raises(UserError, match=sentence):
        rewards_of(Given(), ["", ""], [Example("a", "", ""), Example("b", "", "")])


def test_a_module_that_ends_the_program_is_explained(tmp_path, monkeypatch):
    (tmp_path / "ends_at_once.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"in a module that cannot be imported \(SystemExit: 3, .*ends_at_once.py:2\)"):
        make_reward("ends_at_once.x")


def test_a_judge_that_cannot_be_loaded_is_an_error(tmp_path):
    for judged in (RefusalReward(str(tmp_path / "none")), SimilarityReward(str(tmp_path / "none"))):
        with pytest.raises(UserError, match=r"the reward model .* could not be loaded .* Set data.task_args.judge to"):
            judged.load("cpu")
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
