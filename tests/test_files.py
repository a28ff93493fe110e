"""Results are written whole or not at all."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import check_writable, write_atomically, write_between, write_whole
from corrsteer_pl.methods.runs.files import RunFiles
from tests.conftest import make_trainer


def fills_the_disk(file):
    file.write_text("half of it", encoding="utf-8")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, lambda file: file.write_text("old", encoding="utf-8"))
    with pytest.raises(UserError, match=r"x.json cannot be written \(No space left on device\)"):
        write_atomically(path, fills_the_disk)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_of_weights_is_one_sentence(tmp_path):
    def write(file):
        file.write_text("half of it", encoding="utf-8")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"merged cannot be written \(Error while serializing.*\). Name another place"):
        write_whole(tmp_path / "new/export/merged", write)
    assert list(tmp_path.iterdir()) == [], "folders that were made for it are gone, too"


def test_an_interruption_leaves_nothing_half_written(tmp_path):
    def interrupted(file):
        file.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 kB, less than a checkpoint needs."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine lets no file system be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(small_disk):
    (small_disk / "last.ckpt").write_bytes(b"old")
    data = TaskDataModule(train_size=96, val_size=16)
    options = {"callbacks": [RunFiles()], "enable_checkpointing": True, "default_root_dir": small_disk}
    with pytest.raises(UserError, match=r"last.ckpt cannot be written \(No space left on device\)"):
        make_trainer(**options).fit(CorrSteer("demo", "demo"), datamodule=data)
    assert (small_disk / "last.ckpt").read_bytes() == b"old"
    assert [path.name for path in small_disk.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
def test_folders_that_cannot_be_are_one_sentence(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / name)


def test_a_folder_that_one_may_not_look_into_is_one_sentence(tmp_path, monkeypatch):
    looked = Path.exists

    def exists(path, **options):
        if path != tmp_path and tmp_path in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return looked(path, **options)

    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="not yours to write"):
        check_writable(tmp_path / "a" / "b")


def test_a_text_goes_between_its_marks_and_nowhere_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n", encoding="utf-8")
    write_between(readme, "a", "new\n")
    assert readme.read_text(encoding="utf-8") == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter\n"
    for text in ("", "<!-- end of b -->\n<!-- b -->", "<!-- b -->"):
        readme.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="has no place for a table"):
            write_between(readme, "b", "new")
        assert readme.read_text(encoding="utf-8") == text
