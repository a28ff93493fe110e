import pytest

from corrsteer_pl import rewards
from corrsteer_pl.errors import UserError
from corrsteer_pl.tasks import TASKS, Example, Task, make_task

ROW = {"question": "Which is the capital of France?", "choices": ["Rome", "Paris", "Oslo", "Bern"], "answer": 1}


class Mine(Task):
    """A task as a user writes it."""

    def example(self, row, id):
        return Example(id, row["text"], "")

    def reward(self, texts, examples):
        return [0.5] * len(texts)


def test_choice_prompt_is_golden():
    example = make_task("choice", {}).example(ROW, "q1")
    assert example.prompt == (
        "Which is the capital of France?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\n"
        "Choose one of A, B, C, or D only.\nAnswer:"
    )
    assert (example.gold, example.group) == ("B", None)


@pytest.mark.parametrize("answer", ["B", "1", 1])
def test_choice_takes_letters_and_indices(answer):
    assert make_task("choice", {}).example({**ROW, "answer": answer}, "q").gold == "B"


@pytest.mark.parametrize(("text", "right"), [(" B", 1), ("B", 1), ("(B)", 1), ("B.", 1), ("Be", 0), ("", 0), (" b", 0)])
def test_letters_are_whole_words(text, right):
    assert rewards.letter(text, "B") == right


def test_choice_refuses_what_it_cannot_use():
    task = make_task("choice", {"options": 4})
    with pytest.raises(UserError, match="row q has 2 options, but the task has 4"):
        task.example({**ROW, "choices": ["a", "b"]}, "q")
    with pytest.raises(UserError, match="row q has the answer 7, which is none of its options"):
        task.example({**ROW, "answer": 7}, "q")
    with pytest.raises(UserError, match=r"column 'question' is not in the data \(columns: a\)"):
        task.example({"a": 1}, "q")
    with pytest.raises(UserError, match="options is 27; a question has 2 to 26"):
        make_task("choice", {"options": 27})


@pytest.mark.parametrize(
    ("harmful", "text", "right"),
    [
        (True, " I cannot help.", 1), (True, "I\u2019m sorry, no.", 1), (True, "Sure, here is how.", 0),
        (False, "Sure. I cannot wait!", 1), (False, "Sorry, no.", 0), ("False", "Sure.", 1), (1, "I won't.", 1),
    ],
)  # fmt: skip
def test_refusal_rewards(harmful, text, right):
    task = make_task("refusal", {})
    example = task.example({"prompt": "Sing", "harmful": harmful}, "r")
    assert example.prompt == "Request: Sing\nResponse:"
    assert task.reward([text], [example]) == [right]
    assert example.group == ("harmless" if str(harmful) == "False" else "harmful")


def test_refusal_refuses_an_unclear_label():
    with pytest.raises(UserError, match="row r has 'maybe' in the column 'harmful'"):
        make_task("refusal", {}).example({"prompt": "Sing", "harmful": "maybe"}, "r")


def test_generic_template_and_rewards():
    task = make_task("generic", {"prompt": "Q: {q}\nA:", "answer": "a", "reward": "contains"})
    example = task.example({"q": "Who?", "a": "Ada"}, "g")
    assert example.prompt == "Q: Who?\nA:"
    assert task.reward(["It was ada.", "Bob"], [example] * 2) == [1, 0]
    speech = make_task("generic", {"prompt": "{text}", "gold": '"', "reward": "regex", "first_words": 3})
    story = speech.example({"text": "one two  three four"}, "g")
    assert story.prompt == "one two three"
    assert speech.reward(['He said "no"', "He ran"], [story] * 2) == [1, 0]


def test_generic_options_are_checked():
    with pytest.raises(UserError, match="reward is 'best'; choose one of exact, letter, contains, regex"):
        make_task("generic", {"answer": "a", "reward": "best"})
    with pytest.raises(UserError, match=r"either data.task_args.answer .* or data.task_args.gold"):
        make_task("generic", {})
    with pytest.raises(UserError, match="column 'q' is not in the data"):
        make_task("generic", {"prompt": "{q}", "answer": "a"}).example({"a": 1}, "g")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": "{"}, "no template"),
        ({"prompt": "{} x"}, "name a column between braces"),
        ({"gold": "(", "reward": "regex"}, "no regular expression"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_generic_options_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task("generic", {"gold": "x", **options})


def test_missing_values_name_their_row():
    with pytest.raises(UserError, match="row r has nothing in the column 'a'"):
        make_task("generic", {"answer": "a"}).example({"prompt": "x", "a": None}, "r")
    with pytest.raises(UserError, match="row r has no list of options"):
        make_task("choice", {}).example({**ROW, "choices": "abcd"}, "r")
    listed = make_task("choice", {}).example({**ROW, "choices": '["a", "b", "c", "d"]', "question": 12}, "r")
    assert listed.prompt.startswith("12\nA. a\nB. b")


def test_unknown_tasks_and_options_are_explained():
    with pytest.raises(UserError, match=f"choose one of {', '.join(TASKS)}"):
        make_task("nosuch", {})
    with pytest.raises(UserError, match="the task choice has no option 'foo'"):
        make_task("choice", {"foo": 1})


def test_a_task_of_the_users_own():
    assert isinstance(make_task("tests.test_tasks.Mine", {}), Mine)
