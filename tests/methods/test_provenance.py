"""Checkpoints say where they come from, and what does not belong or is damaged is one sentence."""

import copy
from contextlib import suppress

import pytest
import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.runs.provenance import FORMAT, KEY, Provenance, read_checkpoint
from tests.conftest import make_trainer

DATA = {"train_size": 96, "val_size": 24, "test_size": 24}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "x.ckpt"
    module, trainer = CorrSteer("demo", "demo"), make_trainer()
    trainer.fit(module, datamodule=TaskDataModule(**DATA))
    trainer.save_checkpoint(path, weights_only=False)
    return path


def changed(whole, change):
    checkpoint = torch.load(whole, weights_only=True)
    change(checkpoint)
    path = whole.with_name("changed.ckpt")
    torch.save(checkpoint, path)
    return path


def test_the_record_says_where_a_checkpoint_comes_from(whole):
    record = Provenance.read(torch.load(whole, weights_only=True))
    assert (record.format, record.method, record.counted) == (FORMAT, "corrsteer", 96)
    settled = {"pool": "max", "coefficient_pool": None, "coefficient": "mean", "score": "pearson", "site": "declared"}
    assert record.settled == {
        **settled,
        "min_improvement": 0.0,
        "significance_level": None,
        "control": "none",
        "raw": False,
    }
    assert record.resumed == {"dtype": "float32", "sae_dtype": "float32", "permutations": 32}
    assert set(record.versions) == {"corrsteer_pl", "torch", "lightning", "transformers", "sae-lens"}
    assert set(record.saes["fingerprints"]) == {"0", "1", "2", "3"}
    assert set(record.llm) == {"name", "fingerprint"}


def test_every_flipped_byte_of_the_contents_is_found(whole):
    data, path = whole.read_bytes(), whole.with_name("flipped.ckpt")
    loaded = torch.load(whole, weights_only=True)
    direction = next(iter(loaded[KEY]["state"]["directions"].values()))
    # Between the contents there is padding, in which a byte means nothing.
    for tensor in (loaded["state_dict"]["sums.merged.layer0_max.xx"], direction):
        place = data.find(tensor.numpy().tobytes()) + 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match="is damaged or none at all"):
            read_checkpoint(path)
    assert read_checkpoint(whole)[KEY]["method"] == "corrsteer"


def test_other_formats_and_programs_say_what_to_do(whole, tmp_path):
    for version in (1, FORMAT + 1):
        path = changed(whole, lambda c, v=version: c[KEY].update(format=v))
        with pytest.raises(
            UserError, match=f"has format {version}, but this version of corrsteer_pl reads format {FORMAT}"
        ):
            read_checkpoint(path)
    # The first format had no number.
    with pytest.raises(UserError, match="has format 1, but"):
        read_checkpoint(changed(whole, lambda c: c.update({KEY: {"position": 96, "settled": {}}})))
    with pytest.raises(UserError, match="was not written by corrsteer_pl"):
        read_checkpoint(changed(whole, lambda c: c.pop(KEY)))
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="was not written by corrsteer_pl"):
        read_checkpoint(tmp_path / "list.ckpt")


def paths(value, at=()):
    """Where every field of a nested record is."""
    yield at
    if isinstance(value, dict) and len(at) < 4:
        for key, inner in value.items():
            yield from paths(inner, (*at, key))


def junk(record, at, value):
    """A record with another value, or none, at a place."""
    record = copy.deepcopy(record)
    *outer, last = at
    inner = record
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return record


@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, float("nan")])
def test_a_record_with_junk_in_it_is_refused_or_harmless(whole, value):
    stored = torch.load(whole, weights_only=True)
    unread = {"versions", "name"}  # for people to read
    for at in paths(stored[KEY]):
        if not at or unread & set(at):
            continue
        checkpoint = {**stored, KEY: junk(stored[KEY], at, value)}
        module = CorrSteer("demo", "demo")
        with suppress(UserError):
            module.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("field", ["coefficient", "correlation", "validation_reward"])
def test_values_that_are_no_numbers_are_refused(whole, field):
    def spoil(checkpoint):
        checkpoint[KEY]["state"]["selection"]["candidates"][0][field] = float("nan")

    with pytest.raises(UserError, match="damaged"):
        CorrSteer.load_from_checkpoint(changed(whole, spoil))


def test_directions_have_to_be_finite_and_complete(whole):
    def spoil(checkpoint):
        next(iter(checkpoint[KEY]["state"]["directions"].values()))[3] = float("inf")

    with pytest.raises(UserError, match="no usable direction for the feature"):
        CorrSteer.load_from_checkpoint(changed(whole, spoil))
    with pytest.raises(UserError, match="no usable direction for the feature"):
        CorrSteer.load_from_checkpoint(changed(whole, lambda c: c[KEY]["state"]["directions"].clear()))


def test_rules_and_signs_without_candidates_are_refused(whole):
    def negatives(checkpoint):
        selection = checkpoint[KEY]["state"]["selection"]
        for name in ("candidates", "features"):
            selection[name] = [f for f in selection[name] if f["sign"] == "negative"]

    path = changed(whole, negatives)
    with pytest.raises(UserError, match="model.sign is positive, but the candidates of the fit are negative"):
        CorrSteer.load_from_checkpoint(path, sign="positive")
    with pytest.raises(UserError, match="model.rule is all, which takes positive candidates, but the fit has none"):
        CorrSteer.load_from_checkpoint(path, rule="all")
    with pytest.raises(UserError, match="model.rule is all, which takes positive candidates, but model.sign is negat"):
        CorrSteer("demo", "demo", rule="all", sign="negative")
    with pytest.raises(UserError, match="layer 9 was not read by the fit"):
        CorrSteer.load_from_checkpoint(path, layers=[9])


def test_a_checkpoint_allows_no_code_of_others(whole):
    path = changed(whole, lambda c: c["hyper_parameters"].update(llm_args={"trust_remote_code": True}))
    with pytest.raises(UserError, match="sets trust_remote_code, which runs code of the model's repository"):
        CorrSteer.load_from_checkpoint(path)
    assert CorrSteer.load_from_checkpoint(path, llm_args={"trust_remote_code": True}).is_fitted
    assert main(["test", "--ckpt_path", str(path)]) == 2
    named = {"task": "generic", "task_args": {"reward": "os.popen", "answer": "a"}}
    path = changed(whole, lambda c: c["datamodule_hyper_parameters"].update(named))
    assert main(["test", "--ckpt_path", str(path)]) == 2


def test_the_command_line_says_which_option_allows_code(whole, capsys):
    path = changed(whole, lambda c: c["hyper_parameters"].update(llm_args={"trust_remote_code": True}))
    assert main(["test", "--ckpt_path", str(path)]) == 2
    assert "give it anew with --model.llm_args.trust_remote_code true." in capsys.readouterr().err
    path = changed(whole, lambda c: c["datamodule_hyper_parameters"].update(task="os.popen"))
    assert main(["test", "--ckpt_path", str(path)]) == 2
    assert "give it anew with --data.task os.popen." in capsys.readouterr().err
    assert main(["test", "--ckpt_path", str(path), "--data.task", "os.popen"]) == 2
    assert "os.popen" in capsys.readouterr().err
