import copy
import csv
import json
from collections import Counter
from itertools import chain

import pyarrow
import pyarrow.parquet
import pytest
import torch

from corrsteer_pl.data import Shard, TaskDataModule
from corrsteer_pl.data.splits import SPLITS
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_atomically, write_jsonl
from corrsteer_pl.tasks import Example

EXAMPLES = [Example(str(i), f"p{i}", "") for i in range(11)]


def collate(prompts):
    return torch.zeros(len(prompts), 1), torch.ones(len(prompts), 1)


def counted(world_size, batch_size, start=0, examples=EXAMPLES):
    """Rows with weight 1 per process, and the number of batches per process."""
    shards = [Shard(examples, collate, batch_size, rank, world_size, start) for rank in range(world_size)]
    rows = [[r for batch in shard for r, w in zip(batch.rows, batch.weight, strict=True) if w] for shard in shards]
    return rows, [sum(1 for _ in shard) for shard in shards]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("start", [0, 3, 10, 11])
def test_every_sample_counts_once_and_processes_have_equal_batches(world_size, batch_size, start):
    rows, batches = counted(world_size, batch_size, start)
    assert sorted(chain(*rows)) == list(range(start, 11))
    assert len(set(batches)) == 1
    assert batches[0] == len(Shard(EXAMPLES, collate, batch_size, 0, world_size, start)) >= 1


def test_chunks_do_not_depend_on_the_number_of_processes():
    alone = [batch.rows for batch in Shard(EXAMPLES, collate, 2)]
    pairs = [[batch.rows for batch in Shard(EXAMPLES, collate, 2, rank, 2)] for rank in (0, 1)]
    assert [chunk for step in zip(*pairs, strict=True) for chunk in step] == alone


def test_an_order_changes_the_company_and_nothing_else():
    order = [4, 2, 0, 1, 3, 10, 9, 8, 7, 6, 5]
    batches = list(Shard(EXAMPLES, collate, 4, order=order))
    assert [batch.rows for batch in batches] == [[4, 2, 0, 1], [3, 10, 9, 8], [7, 6, 5, 5]]
    assert [[e.id for e in batch.examples] for batch in batches] == [[str(r) for r in batch.rows] for batch in batches]
    assert batches[-1].weight.tolist() == [1, 1, 1, 0]


def test_a_fit_goes_on_after_the_samples_counted():
    for batch in Shard(EXAMPLES, collate, 2, 1, 2):
        rest, _ = counted(1, 2, batch.counted)
        assert rest == [list(range(batch.counted, 11))]
    assert batch.counted == 11


def module(path, **options):
    return TaskDataModule(**{"task": "generic", "path": str(path), "task_args": {"answer": "a"}, **options})


def rows(n, prefix=""):
    return [{"prompt": f"{prefix}{i}", "a": "x"} for i in range(n)]


def prompts(data):
    return {split: [example.prompt for example in examples] for split, examples in data.examples.items()}


def test_one_file_is_divided_into_disjoint_splits(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", rows(100))
    data = module(tmp_path / "all.jsonl", seed=3)
    data.setup("fit")
    splits = prompts(data)
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [50, 10, 40]
    assert len(set(chain(*splits.values()))) == 100
    again = module(tmp_path / "all.jsonl", seed=3)
    again.setup("test")
    assert prompts(again) == {"test": splits["test"]}
    other = module(tmp_path / "all.jsonl", seed=4)
    other.setup("fit")
    assert prompts(other) != splits


def test_a_prompt_that_stands_twice_falls_into_one_split_alone(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", rows(50) + rows(50))
    data = module(tmp_path / "all.jsonl")
    data.setup("fit")
    assert sorted(chain(*prompts(data).values())) == sorted(str(i) for i in range(50))


def test_a_folder_has_a_file_per_split_and_sizes_limit(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(30, "t"))
    write_jsonl(tmp_path / "dev.jsonl", rows(20, "d"))
    data = module(tmp_path, val_split="dev", test_split="dev", train_size=7, val_size=2)
    data.setup("fit")
    splits = prompts(data)
    assert len(splits["train"]) == 7
    assert all(p.startswith("t") for p in splits["train"])
    assert len(splits["validation"]) == 2
    assert len(splits["test"]) == 16
    assert not set(splits["validation"]) & set(splits["test"])


def test_csv_and_parquet_give_the_rows_of_jsonl(tmp_path):
    table = [{"prompt": "a,b", "a": "1"}, {"prompt": 'say "x"\nnow', "a": "2"}]
    write_jsonl(tmp_path / "r.jsonl", table)
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "a"])
        writer.writeheader()
        writer.writerows(table)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "r.parquet")
    assert (
        read_rows(tmp_path / "r.jsonl") == read_rows(tmp_path / "r.csv") == read_rows(tmp_path / "r.parquet") == table
    )


def test_what_stands_in_two_splits_is_left_to_the_later_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(5))
    write_jsonl(tmp_path / "validation.jsonl", rows(3, "v"))
    write_jsonl(tmp_path / "test.jsonl", rows(2))
    data = module(tmp_path)
    with pytest.warns(UserWarning, match="2 of 5 train prompts are test prompts too; they are left out of train"):
        data.setup("fit")
    assert {split: sorted(some) for split, some in prompts(data).items()} == {
        "train": ["2", "3", "4"], "validation": ["v0", "v1", "v2"], "test": ["0", "1"],
    }  # fmt: skip


def test_bad_data_is_explained(tmp_path):
    with pytest.raises(UserError, match="which does not exist. Set it to a file"):
        module(tmp_path / "none").setup("fit")
    with pytest.raises(UserError, match="the task generic needs data. Set data.path"):
        TaskDataModule("generic", task_args={"answer": "a"}).setup("fit")
    write_jsonl(tmp_path / "train.jsonl", rows(5))
    with pytest.raises(UserError, match=r"no file for the split 'validation' \(it has train\)"):
        module(tmp_path).setup("fit")
    write_jsonl(tmp_path / "validation.jsonl", [])
    with pytest.raises(UserError, match="the validation split of generic is empty"):
        module(tmp_path).setup("fit")
    with pytest.raises(UserError, match="the train split of generic is empty"):
        module(tmp_path, train_size=0, val_split="train").setup("fit")
    (tmp_path / "validation.jsonl").write_text('{"prompt": "x", "a": "y"}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"validation.jsonl, line 3: no valid JSON"):
        module(tmp_path).setup("fit")
    (tmp_path / "validation.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"line 1: a JSON object is needed, not list"):
        module(tmp_path).setup("fit")
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(UserError, match=r"none of the kinds that can be read \(.jsonl, .csv, .parquet, "):
        module(tmp_path / "rows.xlsx").setup("fit")
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(UserError, match="no valid parquet file"):
        module(tmp_path / "rows.parquet").setup("fit")
    with pytest.raises(UserError, match="batch_size is 0"):
        module(tmp_path, batch_size=0)
    with pytest.raises(UserError, match="restrict needs a task with answer letters"):
        module(tmp_path, restrict=True)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")

    def half(path):
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_unwritable_folder_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* Set --trainer.default_root_dir"):
        write_jsonl(tmp_path / "file" / "x.jsonl", [json.loads("{}")])


@pytest.mark.filterwarnings("ignore:.* prompts are .* prompts too")
def test_shots_are_the_same_at_every_stage(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    write_jsonl(tmp_path / "validation.jsonl", rows(30))
    write_jsonl(tmp_path / "test.jsonl", rows(20))
    shots = []
    for stage in ("fit", "validate", "test", "predict"):
        data = module(tmp_path, shots=3)
        data.setup(stage)
        shots.append([example.prompt for example in data.shots])
    # Rows 30 to 39 are the only ones that neither validation nor test have.
    assert shots == [shots[0]] * 4
    assert {int(prompt) for prompt in shots[0]} < set(range(30, 40))


def test_a_task_without_solutions_has_no_shots(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", rows(40))
    data = TaskDataModule("generic", str(tmp_path / "rows.jsonl"), {"gold": "x", "reward": "regex"}, shots=1)
    with pytest.raises(UserError, match="has no solution to show: the task generic judges responses without one"):
        data.setup("fit")


def test_files_of_a_folder_are_named_by_subset_split_and_part(tmp_path):
    for name in ("a.train", "b.train", "c.test", "validation-00000-of-00001"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(10, f"{name} "))
    data = module(tmp_path, train_split="train", test_split="test")
    data.setup("fit")
    splits = prompts(data)
    assert {prompt.split()[0] for prompt in splits["train"]} == {"a.train", "b.train"}
    assert len(splits["validation"]) == 10
    one = module(tmp_path, subset="b")
    one.setup("fit")
    assert {prompt.split()[0] for prompt in prompts(one)["train"]} == {"b.train"}
    everything = module(tmp_path, train_split="all", val_split="all", test_split="all")
    everything.setup("fit")
    assert [len(examples) for examples in prompts(everything).values()] == [20, 4, 16]


def test_rows_are_filtered_by_their_columns(tmp_path):
    table = [{"prompt": f"{i}", "a": "x", "kind": "odd" if i % 2 else "even", "n": i % 3} for i in range(90)]
    write_jsonl(tmp_path / "rows.jsonl", table)
    data = module(tmp_path / "rows.jsonl", filter={"kind": "odd", "n": [0, 2]})
    data.setup("fit")
    kept = {int(prompt) for prompt in chain(*prompts(data).values())}
    assert kept == {i for i in range(90) if i % 2 and i % 3 != 1}
    with pytest.raises(
        UserError, match="data.filter wants kind 'add', which no row has. Set it to one of 'even', 'odd'"
    ):
        module(tmp_path / "rows.jsonl", filter={"kind": "add"}).setup("fit")


def test_a_folder_without_fit_rows_divides_its_validation_rows(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", rows(60, "v"))
    write_jsonl(tmp_path / "test.jsonl", rows(20, "t"))
    data = module(tmp_path)
    data.setup("fit")
    splits = prompts(data)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [50, 10, 20]
    assert not set(splits["train"]) & set(splits["validation"])


def test_a_size_takes_a_seeded_sample_in_the_order_of_the_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20, "t"))
    write_jsonl(tmp_path / "validation.jsonl", rows(20, "v"))
    write_jsonl(tmp_path / "test.jsonl", rows(100))
    data = module(tmp_path, test_size=30)
    data.setup("test")
    chosen = [int(example.prompt) for example in data.examples["test"]]
    assert chosen == sorted(chosen)
    assert max(chosen) > 60
    assert len(chosen) == 30


def test_a_balance_keeps_as_many_rows_of_each_value(tmp_path):
    rows = [{"prompt": f"Do {i}.", "harmful": i % 10 == 0} for i in range(100)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    shares = {"task": "refusal", "path": str(tmp_path / "rows.jsonl"), "balance": "harmful"}
    found = TaskDataModule(**shares)
    found.setup("fit")
    found.setup("test")
    kinds = Counter(e.groups[0] for some in found.rows.examples(SPLITS, 0).values() for e in some)
    assert kinds == {"harmful": 10, "harmless": 10}
    with pytest.raises(UserError, match="data.balance names the column 'kind', which is not in the data"):
        TaskDataModule(**{**shares, "balance": "kind"}).setup("fit")


def test_a_system_prompt_stands_first_in_the_chat_and_nowhere_else(llm):
    chatty = copy.copy(llm)
    chatty.tokenizer = copy.deepcopy(llm.tokenizer)
    chatty.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    said = chatty.prompt_ids(["Who?"], True, "Be short.")
    assert chatty.tokenizer.decode(said, skip_special_tokens=True) == "[system] Be short.\n[user] Who?\n[assistant]"
    plain = chatty.tokenizer.decode(chatty.prompt_ids(["Who?"], True), skip_special_tokens=True)
    assert plain == "[user] Who?\n[assistant]"
    assert TaskDataModule(system_prompt="Be short.").uses_chat(chatty)
    for chat, model, why in ((None, llm, "demo has no chat template"), (False, chatty, "data.chat_template is false")):
        with pytest.raises(UserError, match=f"data.system_prompt is set, but {why}"):
            TaskDataModule(system_prompt="Be short.", chat_template=chat).uses_chat(model)


def test_a_fit_may_read_several_data_sets_that_tell_themselves_apart(tmp_path):
    for name, count in (("hazard", 12), ("garden", 9)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "id": i} for i in range(count)])
    paths = [str(tmp_path / "hazard.jsonl"), str(tmp_path / "garden.jsonl")]
    texts = {"task": "text_classification", "path": paths, "task_args": {"label": "source", "positive": ["hazard"]}}
    data = TaskDataModule("demo_qa", fit_on=texts, train_size=100, val_size=4)
    data.setup("fit")
    found = [(example.gold, example.prompt.split()[0]) for example in data.examples["train"]]
    assert sorted(found) == [("negative", "garden")] * 9 + [("positive", "hazard")] * 12
    assert len({example.id for example in data.examples["train"]}) == 21
    uneven = TaskDataModule("demo_qa", fit_on={**texts, "subset": ["one"]}, train_size=100, val_size=4)
    with pytest.raises(UserError, match="data.fit_on.path names 2 data sets and data.fit_on.subset 1"):
        uneven.setup("fit")
    twice = TaskDataModule("demo_qa", fit_on={**texts, "path": [paths[0], paths[0]]}, train_size=100, val_size=4)
    with pytest.raises(UserError, match="names two data sets called 'hazard'. Rename one"):
        twice.setup("fit")


@pytest.mark.parametrize("in_a_folder", [True, False])
def test_a_part_of_a_split_is_named_as_on_the_hub(in_a_folder, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20, "t"))
    parts = {"train_split": "train[:50%]", "val_split": "train[10:-5]", "test_split": "train[75%:]"}
    data = module(tmp_path if in_a_folder else tmp_path / "train.jsonl", **parts)
    for stage in ("fit", "test"):
        data.setup(stage)
        for split, example in ((split, e) for split, some in data.examples.items() for e in some):
            low, high = {"train": (0, 10), "validation": (10, 15), "test": (15, 20)}[split]
            assert low <= int(example.id.rpartition(":")[2]) < high
    assert len(data.examples["test"]) == 5
    with pytest.raises(UserError, match="has no file for the split 'dev'|data.test_split is 'dev'"):
        module(tmp_path if in_a_folder else tmp_path / "train.jsonl", test_split="dev[:5]").setup("test")


@pytest.mark.parametrize("part", ["[: 50%]", "[:5o%]", "[50%]", "[:1.5%]", "[:50%", "[%:]", "[-:]"])
def test_a_part_that_is_none_is_told(part, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20, "t"))
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(UserError, match=r"is no part of train; parts are such as train\[:80%\]"):
            module(path, test_split=f"train{part}").setup("test")


def test_parts_are_of_the_split_and_not_of_its_files(tmp_path):
    for file in (0, 1):
        write_jsonl(tmp_path / f"train-0000{file}-of-00002.jsonl", rows(10, f"{file}-"))
    data = module(tmp_path, test_split="train[8:12]")
    data.setup("test")
    assert sorted(e.prompt.partition("-")[0] for e in data.examples["test"]) == ["0", "0", "1", "1"]


def test_texts_that_begin_alike_are_told_apart(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", [{"text": f"Once upon a time {i}."} for i in range(20)])
    data = TaskDataModule("text", str(tmp_path / "all.jsonl"))
    data.setup("fit")
    assert (len(data.examples["train"]), len(data.examples["validation"])) == (10, 2)
