"""What is distributed: a wheel and a source archive that are whole, and say one version."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from corrsteer_pl.version import __version__

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=cwd, capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def test_the_version_is_said_once():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert "attr: corrsteer_pl.version.__version__" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a checkout")
def test_a_wheel_fits_and_reports_in_an_empty_folder(tmp_path):
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout  # fmt: skip
    for name in files.split("\0"):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    dist, empty = tmp_path / "dist", tmp_path / "empty"
    run("build", "--no-isolation", "--outdir", dist, cwd=tmp_path / "source")
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert __version__ in wheel.name
    run("twine", "check", "--strict", wheel, archive, cwd=tmp_path)
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"LICENSE", "README.md", "corrsteer_pl/formats/reading.py", "configs/demo.yaml"} <= names
    run("pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    empty.mkdir()
    here = {"cwd": empty, "PYTHONPATH": str(tmp_path / "site")}
    assert str(tmp_path / "site") in run("inspect", "corrsteer_pl", "--details", **here)
    small = ["--data.train_size=64", "--data.val_size=20", "--trainer.enable_progress_bar=false"]
    run("corrsteer_pl", "fit", "--config", "demo.yaml", *small, **here)
    run("corrsteer_pl", "report", "checkpoints/demo", **here)
    assert (empty / "checkpoints/demo/report.html").is_file()
