"""Tasks that are answered by likelihood: options as texts, plain texts, and the next sentence."""

import math

import pytest
import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.methods.finetune import Finetune
from corrsteer_pl.methods.prompting import Prompting
from corrsteer_pl.methods.runs.cards import observed
from corrsteer_pl.tasks import make_task
from tests.conftest import SHARED, make_trainer

ROW = {"question": "The sky is", "choices": ["green", "blue and wide", "made of cheese"], "answer": 1}
STORY = 'Mia had a dog. "Come here!" she said. The dog ran. It was happy. They went home. All slept. The end.'


def test_options_are_weighed_per_byte_and_not_shown():
    task = make_task("choice", {"likelihood": True})
    example = task.example(ROW, "r")
    assert example.prompt == "The sky is\nAnswer:"
    assert example.options == ("green", "blue and wide", "made of cheese")
    assert (example.gold, example.solution) == ("B", "blue and wide")
    assert task.likeliest(example, [-5.0, -12.0, -20.0], [1, 3, 3]) == "B"
    assert task.likeliest(example, [-4.0, -12.0, -20.0], [1, 3, 3]) == "A"
    assert task.reward(["B", "A"], [example] * 2) == [1, 0]
    assert task.answers is None
    # Two options that say the same are equally right.
    alike = task.example({**ROW, "choices": ["blue", "blue", "red"]}, "r")
    assert (alike.gold, task.likeliest(alike, [-1.0, -1.0, -9.0], [1, 1, 1])) == ("B", "B")
    own = make_task("choice", {"likelihood": True, "template": "{question}\n{options}\n="}).example(ROW, "r")
    assert own.prompt == "The sky is\nA. green\nB. blue and wide\nC. made of cheese\n="


@pytest.mark.parametrize("name", ["chain_of_thought", "max_new_tokens"])
def test_nothing_is_written_where_options_are_weighed(name):
    with pytest.raises(UserError, match=f"likelihood lets the model write nothing, so leave {name} out"):
        make_task("choice", {"likelihood": True, name: 1 if name == "max_new_tokens" else True})


def test_the_loss_of_a_text_is_per_token():
    task = make_task("text", {"beginning": 2, "words": 3, "group": "kind"})
    (example,) = task.examples({"text": "One day  a cat\nsat down here.", "kind": "cats"}, "r")
    assert (example.prompt, example.options, example.groups) == ("One day", ("a cat\nsat",), ("cats",))
    answer = task.likeliest(example, [-6.0], [4])
    assert answer == "1.500000"
    assert task.reward([answer], [example]) == pytest.approx([math.exp(-1.5)])
    assert task.measures(["1.5", "2.5"], [example] * 2) == {"loss": 2.0}
    assert task.measures([], []) == {"loss": None}
    assert task.examples({"text": "Too short", "kind": ""}, "r") == []
    for name in ("beginning", "words"):
        with pytest.raises(UserError, match=f"{name} is 0; it is a number of words, at least 1"):
            make_task("text", {name: 0})


def test_the_next_sentence_is_among_those_that_follow():
    task = make_task("next_sentence", {"beginning": 2, "options": 3})
    (example,) = task.examples({"text": STORY}, "r")
    assert example.prompt == 'Mia had a dog. "Come here!" she said.'
    assert sorted(example.options) == ["It was happy.", "The dog ran.", "They went home."]
    assert example.options["ABC".index(example.gold)] == "The dog ran." == example.solution
    assert task.examples({"text": "One. Two. Three."}, "r") == []
    # Two options that say the same leave no right answer.
    assert task.examples({"text": "One. Two. Three. Three. Four."}, "r") == []
    golds = {task.examples({"text": f"{i}. {STORY}"}, "r")[0].gold for i in "ABCDEFGHIJKL"}
    assert len(golds) == 3
    with pytest.raises(UserError, match="beginning is 0; it is a number of sentences, at least 1"):
        make_task("next_sentence", {"beginning": 0})


QUESTIONS = [
    {"question": f"{name} the {trade} lives", "choices": ["in the village", "at sea", "on the moon", "nowhere"],
     "answer": i % 4}
    for i, (name, trade) in enumerate((n, t) for n in ("Fenia", "Garin", "Orla", "Tomas") for t in
                                      ("baker", "smith", "weaver", "miller", "potter", "cook"))
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", QUESTIONS)
    return str(tmp_path / "train.jsonl")


def fitted(module):
    """A module that may be tested as it is."""
    module.selection = "whatever"
    return module


def naive_answers(llm, rows):
    found = []
    for row in rows:
        prompt = llm.token_ids(f"{row['question']}\nAnswer:")
        each = []
        for option in row["choices"]:
            ids = llm.following_ids(f" {option}")
            log_p = llm.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            nats = sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))
            each.append(nats / len(option))
        found.append("ABCD"[each.index(max(each))])
    return found


def test_a_fit_reads_the_last_token_of_the_prompt_and_a_test_weighs_options(path, llm):
    rows_by_question = {row["question"]: row for row in QUESTIONS}
    data = TaskDataModule("choice", path, {"likelihood": True}, batch_size=5)
    module = CorrSteer("demo", "demo", rule="all", check_alignment="off", permutations=0)
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    seen = [rows_by_question[e.prompt.removesuffix("\nAnswer:")] for e in data.examples["train"]]
    right = [letter == "ABCD"[row["answer"]] for letter, row in zip(naive_answers(llm, seen), seen, strict=True)]
    assert module.fit_reward == sum(right) / len(right)
    read = torch.stack([last_activation(llm, module.saes[1], row) for row in seen])
    torch.testing.assert_close(module.sums.moments(1, "max").x, read.sum(0).double(), rtol=1e-3, atol=1e-3)
    trainer.test(module, datamodule=data, verbose=False)
    tested = [rows_by_question[o.prompt.removesuffix("\nAnswer:")] for o in module.outcomes]
    assert [o.answer_baseline for o in module.outcomes] == naive_answers(llm, tested)


def last_activation(llm, sae, row):
    found = []
    with_hook = sae.site.hook(llm.model, lambda residual: found.append(residual[0, -1:]))
    llm.model(torch.tensor([llm.token_ids(f"{row['question']}\nAnswer:")]))
    with_hook.remove()
    return sae.encode(found[0])[0]


@pytest.mark.parametrize("method", ["finetune", "prompting"])
def test_the_rivals_learn_from_the_text_of_the_right_option(method, path):
    data = TaskDataModule("choice", path, {"likelihood": True}, batch_size=4)
    module = Finetune("demo", lr=1e-2) if method == "finetune" else Prompting("demo", examples=2)
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    first = data.examples["train"][0]
    row = next(row for row in QUESTIONS if first.prompt.startswith(row["question"]))
    right = row["choices"][row["answer"]]
    if method == "prompting":
        assert module.turns[:2] == [first.prompt, right]
        return
    assert module.llm.tokenizer.decode(module.answer_ids(first)).strip() == right
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["changed"] > 0


def test_options_without_text_are_told(tmp_path):
    for choices in (["", "x"], [" ", "x"]):
        write_jsonl(tmp_path / "train.jsonl", [{**row, "choices": choices, "answer": 1} for row in QUESTIONS])
        data = TaskDataModule("choice", str(tmp_path / "train.jsonl"), {"likelihood": True})
        with pytest.raises(UserError, match="24 of 24 rows have nothing in the column 'choices' .train.jsonl, line 1"):
            make_trainer().fit(Prompting("demo", examples=1), datamodule=data)


def test_cards_show_what_was_read(path):
    data = TaskDataModule("choice", path, {"likelihood": True}, batch_size=5)
    module = CorrSteer("demo", "demo", rule="all", check_alignment="off", permutations=0)
    make_trainer().fit(module, datamodule=data)
    for place, seen in observed(module, [0, 3], everywhere=False).items():
        prompt = data.token_ids(data.examples["train"][place], data.fit_task)
        assert (seen.ids, list(seen.counted)) == (prompt, [len(prompt) - 1])


def test_letters_are_not_forced_upon_options_that_are_weighed(path):
    with pytest.raises(UserError, match="data.restrict needs a task with answer letters"):
        TaskDataModule("choice", path, {"likelihood": True}, restrict=True)


def test_a_prompt_whose_longest_option_exceeds_the_context_is_left_out(path, llm, monkeypatch, tmp_path):
    longest = max(len(llm.token_ids(f"{row['question']}\nAnswer:")) for row in QUESTIONS) + 8
    monkeypatch.setattr(llm.config, "max_position_embeddings", longest)
    long = {**QUESTIONS[0], "question": "Who?", "choices": ["a", "b " * longest]}
    write_jsonl(tmp_path / "test.jsonl", [*QUESTIONS[:9], long])
    module = fitted(Prompting("demo", examples=1))
    module.llm = llm
    data = TaskDataModule("choice", str(tmp_path), {"likelihood": True})
    with pytest.warns(UserWarning, match=f"exceeds the context of demo .{longest}.: 1 of 10 test prompts are left out"):
        make_trainer().predict(module, datamodule=data)


def test_what_is_to_be_unlearnt_is_rewarded_for_its_loss(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"{row['question']} in the village."} for row in QUESTIONS])
    found = {}
    for reverse in (False, True):
        data = TaskDataModule("text", str(tmp_path / "train.jsonl"), reverse=reverse)
        module = fitted(Prompting("demo", examples=1))
        make_trainer().test(module, datamodule=data, verbose=False)
        found[reverse] = module.metrics
    loss, outcomes = found[False]["measures"]["loss"]["baseline"], module.outcomes
    assert loss == pytest.approx(sum(float(o.answer_baseline) for o in outcomes) / len(outcomes))
    assert found[True]["measures"] == found[False]["measures"]
    assert found[True]["reward_baseline"] == pytest.approx(1 - found[False]["reward_baseline"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_texts_make_questions():
    rows = read_rows(SHARED / "data" / "tinystories" / "train.jsonl")
    task = make_task("next_sentence", {})
    made = [example for i, row in enumerate(rows) for example in task.examples(row, str(i))]
    assert len(made) > 0.95 * len(rows)
    assert all(len(set(example.options)) == 4 and all(example.options) for example in made)
    shares = [sum(e.gold == letter for e in made) / len(made) for letter in "ABCD"]
    assert max(shares) < 0.33
