"""Shared fixtures: the shipped model, hand-made autoencoders, a trainer without noise, and a hub on loopback."""

import os
import socket
import tempfile

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
CACHE = tempfile.TemporaryDirectory()
# Before any import reads them. Nothing answers at that port until a test asks for the hub.
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}", "HF_HOME": CACHE.name, "HF_HUB_DISABLE_XET": "1"}

import subprocess
import sys
from contextlib import chdir
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from corrsteer_pl.cli.program import main
from corrsteer_pl.models.llm import LanguageModel
from tests import architectures

CONFIGS = Path(__file__).parents[1] / "configs"
SHARED = Path(__file__).parents[2] / "shared"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def llm():
    return LanguageModel.load("demo")


@pytest.fixture(params=architectures.CONFIGS)
def tiny(request, llm):
    return architectures.make_tiny(request.param, llm.tokenizer)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    from tests.hub import Hub, fill

    with Hub(tmp_path_factory.mktemp("hub"), HUB_PORT) as hub:
        yield fill(hub)


def make_trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "accelerator": "cpu", **options})


def make_sae(folder, layer, W_enc, W_dec, b_enc=None, kind="resid_post"):
    """Save a standard (ReLU) SAE with the given weights, (d_in, d_sae) and (d_sae, d_in)."""
    hook = f"blocks.{layer}.hook_{kind}"
    d_in, d_sae = W_enc.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook)))
    sae.W_enc.data, sae.W_dec.data = W_enc.contiguous(), W_dec.contiguous()
    sae.b_enc.data = torch.zeros(d_sae) if b_enc is None else b_enc
    sae.b_dec.data = torch.zeros(d_in)
    sae.save_model(folder / hook)
    return folder


def random_saes(folder, layers, d_in=128, d_sae=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        W_enc = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
        make_sae(folder, layer, W_enc, W_enc.T.clone())
    return folder


def assert_same_selection(one, other):
    """Equal but for the order of additions, which the mark tells, too."""
    assert_nearly_equal(*(asdict(replace(selection, mark="")) for selection in (one, other)))


def assert_nearly_equal(one, other, rtol=1e-12):
    """Nested dicts and sequences with equal contents; floats within ``rtol``."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        for some, others in zip(one, other, strict=True):
            assert_nearly_equal(some, others, rtol)
    else:
        assert one == (pytest.approx(other, rel=rtol) if isinstance(other, float) else other)


def run_here(*args, cwd):
    """Run the command line within this process, which saves the seconds that imports take; it has to succeed."""
    with chdir(cwd):
        assert main([str(arg) for arg in args]) == 0


def cli(*args, cwd, timeout=300, check=True, env=None):
    """Run the command line as a user does, in a process of its own; with `check`, it has to succeed."""
    command = [sys.executable, "-m", "corrsteer_pl", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
