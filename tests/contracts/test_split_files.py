"""Contract: a split is read from the one file that holds it, whatever its form, or rejected."""

import gzip
import json

import datasets
import pandas
import pytest

from corrsteer_pl import TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl


def rows(count, prefix=""):
    return [{"prompt": f"{prefix}{i}", "a": "x, y"} for i in range(count)]


def lines(some):
    return "".join(json.dumps(row) + "\n" for row in some)


def module(path, **options):
    return TaskDataModule(**{"task": "generic", "path": str(path), "task_args": {"answer": "a"}, **options})


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", rows(60, "v"))
    write_jsonl(tmp_path / "test.jsonl", rows(20, "t"))
    return tmp_path


def gz(path, text):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


WRITERS = {
    "train.json": lambda path, some: path.write_text(json.dumps(some)),
    "train.JSONL": lambda path, some: path.write_text(lines(some)),
    "train.jsonl.gz": lambda path, some: gz(path, lines(some)),
    "train.json.gz": lambda path, some: gz(path, json.dumps(some)),
    "train.csv": lambda path, some: pandas.DataFrame(some).to_csv(path, index=False),
    "train.csv.gz": lambda path, some: pandas.DataFrame(some).to_csv(path, index=False, compression="gzip"),
    "train.tsv": lambda path, some: pandas.DataFrame(some).to_csv(path, index=False, sep="\t"),
    "train.parquet": lambda path, some: datasets.Dataset.from_list(some).to_parquet(path),
    "train-00000-of-00001.json": lambda path, some: datasets.Dataset.from_list(some).to_json(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_train_file_of_any_known_form_is_the_fit_split(name, folder):
    WRITERS[name](folder / name, rows(30, "n"))
    data = module(folder)
    data.setup("fit")
    assert {e.prompt for e in data.examples["train"]} == {f"n{i}" for i in range(30)}
    assert {e.gold for e in data.examples["train"]} == {"x, y"}
    assert len(data.examples["validation"]) == 60


@pytest.mark.parametrize(
    "name",
    ["train.arrow", "train.xlsx", "train.parquet.gz", "train.jsonl.zst", "train.txt", "training.jsonl", "Train.jsonl",
     "train_0.jsonl", "auxiliary_train.jsonl", "train.pkl", "Age.train.feather"],
)  # fmt: skip
def test_the_validation_rows_are_not_divided_while_a_train_file_exists(name, folder):
    (folder / name).write_text(lines(rows(30)))
    with pytest.raises(UserError, match=name):
        module(folder).setup("fit")
    # Neither validation nor test need it.
    module(folder).setup("test")


@pytest.mark.parametrize("name", ["train", "train.jsonl", "train.parquet"])
def test_a_folder_in_place_of_a_split_file_is_rejected(name, folder):
    (folder / name).mkdir()
    with pytest.raises(UserError, match=name):
        module(folder).setup("fit")
    with pytest.raises(UserError, match="is a folder in place of a file of the split 'train'"):
        module(folder, train_split="train").setup("fit")


@pytest.mark.parametrize(
    "name", ["train.py", "train.md", "README.md", "training_notes.md", ".train.jsonl.swp", "strain.jsonl"]
)
def test_other_files_are_no_train_files(name, folder):
    (folder / name).write_text("{}")
    data = module(folder)
    data.setup("fit")
    assert len(data.examples["train"]) == 50


@pytest.mark.parametrize(
    "pair",
    [("train.jsonl", "train.csv"), ("train.jsonl", "train.jsonl.gz"), ("train.json", "train.JSONL"),
     ("train.jsonl", "train-00000-of-00001.jsonl")],
)  # fmt: skip
def test_the_same_split_in_two_forms_is_rejected(pair, folder):
    for name in pair:
        gz(folder / name, lines(rows(3))) if name.endswith("gz") else (folder / name).write_text(lines(rows(3)))
    for split in ("train", "all"):
        with pytest.raises(UserError, match="the split 'train' is there more than once") as error:
            module(folder, train_split=split).setup("fit")
        assert all(name in str(error.value) for name in pair)


def test_a_missing_shard_is_named(folder):
    write_jsonl(folder / "train-00000-of-00002.jsonl", rows(10))
    with pytest.raises(UserError, match="1 of 2 files, and lacks number 1"):
        module(folder).setup("fit")
    write_jsonl(folder / "train-00001-of-00002.jsonl", rows(10, "second "))
    data = module(folder)
    data.setup("fit")
    assert len(data.examples["train"]) == 20
    write_jsonl(folder / "train-00000-of-00003.jsonl", rows(10))
    with pytest.raises(UserError, match="more than once"):
        module(folder).setup("fit")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(rows(3)), json.dumps({"data": rows(3)}), json.dumps({"version": 1, "data": rows(3)}), lines(rows(3)),
        "\ufeff" + json.dumps(rows(3), indent=1).replace("\n", "\r\n"),
    ],
)  # fmt: skip
def test_json_files_hold_a_list_of_objects(text, tmp_path):
    (tmp_path / "r.json").write_bytes(text.encode())
    assert read_rows(tmp_path / "r.json") == rows(3)


@pytest.mark.parametrize("text", ['{"prompt": ["a", "b"]}', '{"a": 1, "b": 2}', "[1, 2]", '"x"', "", "[" * 9999])
def test_json_files_that_hold_something_else_are_rejected_or_empty(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    if text:
        with pytest.raises(UserError, match=r"r.json"):
            read_rows(tmp_path / "r.json")
    else:
        assert read_rows(tmp_path / "r.json") == []


def test_a_broken_archive_is_one_sentence(tmp_path):
    gz(tmp_path / "r.jsonl.gz", lines(rows(5000)))
    content = (tmp_path / "r.jsonl.gz").read_bytes()
    for broken in (content[:-20], content[: len(content) // 2], b"no archive", content[:40] + b"xxxx" + content[44:]):
        (tmp_path / "r.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match="r.jsonl.gz"):
            read_rows(tmp_path / "r.jsonl.gz")


def test_a_description_of_the_data_set_is_no_split(folder):
    (folder / "dataset_info.json").write_text('{"features": {}}')
    data = module(folder, train_split="all", val_split="all", test_split="all")
    data.setup("fit")
    assert sum(len(e) for e in data.rows.examples(("train", "validation", "test"), 0).values()) == 80


def test_a_development_split_is_not_taken_for_validation_in_silence(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20))
    write_jsonl(tmp_path / "dev.jsonl", rows(20, "d"))
    with pytest.raises(UserError, match="no file for the split 'validation' .it has dev, train.*data.val_split"):
        module(tmp_path).setup("fit")
