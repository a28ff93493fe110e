"""Files as users have them: broken, foreign, or no files at all."""

import os
import random
from contextlib import suppress

import pyarrow
import pyarrow.parquet
import pytest

from corrsteer_pl import TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.tasks import make_task

GENERIC = {"task": "generic", "task_args": {"answer": "a"}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": %s}' % ("9" * 5000), "line 2: no valid JSON .*4300 digits"),
        ("[" * 100_000, "line 2: no valid JSON .nested too deeply"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "line 2: no valid JSON .nested too deeply"),
        ('{"a": "\\ud83d"}', r"line 2: no valid JSON .half of a surrogate pair, '\\ud83d'.. Mend or remove"),
        ('{"a": {"\\uDEAD": 1}}', "half of a surrogate pair"),
        ('{"a": 1}}', "Extra data"),
        ("NaN", "a JSON object is needed, not float"),
        ("\ufeff{}", "no valid JSON"),
    ],
)
def test_lines_that_are_no_usable_json_are_named(text, sentence, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": "fine"}\n' + text + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        read_rows(tmp_path / "r.jsonl")


def test_unusual_json_is_read(tmp_path):
    text = '\ufeff{"a": NaN, "b": -Infinity, "c": "\\ud83d\\ude00", "d": "\\\\ud83d"}\r\n\r\n{"c": "ä"}'
    (tmp_path / "r.jsonl").write_bytes(text.encode())
    first, second = read_rows(tmp_path / "r.jsonl")
    assert (first["c"], first["d"], second) == ("😀", "\\ud83d", {"c": "ä"})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,b\n1,2\n3,4,5\n", r"line 3: more values than columns \(2\)"),
        (b"a,a\n1,2\n", "has two columns 'a'"),
        (b"a\nx\0y\n", "line 2: a NUL character"),
        (b'a,b\n1,"2\n3,4\n', "no valid csv file .unexpected end of data"),
        ("a,b\n1,2\n".encode("utf-16"), "no valid csv file"),
        (b"a\n" + b"x" * 200_000 + b"\n", "no valid csv file .field larger"),
    ],
)
def test_tables_that_would_be_misread_are_refused(content, sentence, tmp_path):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_rows(tmp_path / "r.csv")


def test_cells_of_a_table_that_look_like_json_may_be_none(tmp_path):
    for cell in ("[" * 100_000, "[%s]" % ("9" * 5000), '["\\ud83d", "b"]', "[1"):
        row = {"question": "q", "choices": cell, "answer": "0"}
        with pytest.raises(UserError, match="row r has no list of options"):
            make_task("choice", {}).example(row, "r")
    for cell in ("(" * 100_000, "{" * 1000, "-" * 100_000 + "1", "{[]: 1}"):
        example = make_task("simpleqa", {}).example({"problem": "q", "answer": "a", "metadata": cell}, "r")
        assert example.groups == ()


def test_garbage_of_every_kind_is_one_sentence(tmp_path):
    chance = random.Random(0)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"] * 50, "a": ["y"] * 50}), tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()
    for ending in ("jsonl", "csv", "parquet"):
        for _ in range(60):
            content = chance.randbytes(chance.randrange(200))
            if ending == "parquet":
                at = chance.randrange(len(good))
                content = good[:at] + chance.randbytes(1 + chance.randrange(4)) + good[at + 1 :]
            (tmp_path / f"bad.{ending}").write_bytes(content)
            with suppress(UserError):
                assert all(isinstance(row, dict) for row in read_rows(tmp_path / f"bad.{ending}"))


def test_what_a_library_says_is_put_into_one_line(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(20) + b"\xff\xff\x01\x00\x00\x00\x00\x00PAR1")
    with pytest.raises(UserError, match="bad.parquet") as refused:
        read_rows(tmp_path / "bad.parquet")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "pipe.jsonl"])
def test_devices_and_pipes_are_refused_and_not_waited_for(path, tmp_path):
    if not path.startswith("/"):
        os.mkfifo(tmp_path / path)
        path = str(tmp_path / path)
    with pytest.raises(UserError, match="neither a regular file nor a folder. Set it to one"):
        TaskDataModule(**GENERIC, path=path).setup("fit")


def test_a_pipe_in_a_folder_is_no_split(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="no file for the split 'train'"):
        TaskDataModule(**GENERIC, path=str(tmp_path), train_split="train").setup("fit")
    with pytest.raises(UserError, match="is no regular file"):
        read_rows(tmp_path / "train.jsonl")


def test_a_folder_that_cannot_be_listed_is_explained(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    with pytest.raises(UserError, match=r"the folder .* cannot be read \(Permission denied\)"):
        TaskDataModule(**GENERIC, path=str(tmp_path)).setup("fit")


def test_rows_without_an_id_have_their_place_for_one(tmp_path):
    write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": str(i), "a": "x", "id": None if i % 2 else f"own {i}"} for i in range(8)]
    )
    data = TaskDataModule(**GENERIC, path=str(tmp_path / "r.jsonl"))
    data.setup("test")
    assert {example.id for example in data.examples["test"]} <= {f"r:{i}" for i in (1, 3, 5, 7)} | {
        f"own {i}" for i in (0, 2, 4, 6)
    }
