"""A vector file is added to outputs of blocks as it says, or is rejected by what else it says."""

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from corrsteer_pl.cli.program import main
from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.reading import read_vectors
from corrsteer_pl.models.sites import Site

ONE = torch.arange(1.0, 5)
HOOK = {"steering_vector": ONE, "steering_coefficient": 2.0, "action": "add", "bias": None, "head_index": None}
DEPTH, WIDTH = 4, 128  # of the shipped model


def write_gguf(path, **metadata):
    """As llama.cpp's cvector-generator and repeng write it."""
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 1)
    for name, value in metadata.items():
        writer.add_string(name, value)
    writer.add_tensor("direction.1", ONE.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(path, **metadata):
    save_file({"layers.1": ONE.clone()}, path, metadata=metadata)


WRITERS = {".gguf": write_gguf, ".safetensors": write_safetensors}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"general.name": "happy", "general.description": "happy - sad", "general.license": "mit"},
        {"controlvector.mode": "add"},
        {"hook_point": "resid_post"},
        {"format": "pt", "base_model": "meta-llama/Llama-3.1-8B", "created_at": "2026-01-01"},
    ],
)
def test_files_with_harmless_metadata_are_added(ending, metadata, tmp_path):
    WRITERS[ending](tmp_path / f"some{ending}", **metadata)
    ((site, vector),) = read_vectors(tmp_path / f"some{ending}").vectors.items()
    assert site == Site(1, "resid_post")
    assert torch.equal(vector, ONE)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    ("name", "value"),
    {
        "controlvector.mode": "project",
        "mode": "ablate",
        "easysteer.mode": "project",
        "operation": "subtract",
        "action": "clamp",
        "hook_point": "attn_out",
        "controlvector.site": "mlp_out",
        "hook_name": "blocks.1.hook_resid_pre",
        "layer_type": "mlp",
        "norm_match": "true",
        "position_indices": "[0, 1]",
        "scale": "2.0",
        "coefficient": "-1",
        "normalize": "True",
        "layer": "7",
        "controlvector.type": "reft",
    }.items(),
)
def test_metadata_that_may_change_what_vectors_do_are_rejected(ending, name, value, tmp_path):
    path = tmp_path / f"some{ending}"
    WRITERS[ending](path, **{name: value})
    with pytest.raises(UserError) as raised:
        read_vectors(path)
    assert str(path) in str(raised.value)
    assert f"{name} {value!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"action": "clamp"}, "'clamp'"),
        ({"action": "scale"}, "'scale'"),
        ({"norm_match": True}, "norm_match"),
        ({"positions": [0]}, "positions"),
        ({"steering_coefficient": float("nan")}, "not finite"),
        ({"steering_coefficient": "strong"}, "cannot be read"),
    ],
)
def test_hook_points_of_lm_eval_with_another_operation_are_rejected(changed, message, tmp_path):
    torch.save({"layers.1": {**HOOK, **changed}}, tmp_path / "hooks.pt")
    with pytest.raises(UserError, match=message):
        read_vectors(tmp_path / "hooks.pt")


def test_a_hook_point_of_lm_eval_is_its_vector_times_its_coefficient(tmp_path):
    torch.save({"layers.1": HOOK}, tmp_path / "hooks.pt")
    assert torch.equal(read_vectors(tmp_path / "hooks.pt").vectors[Site(1, "resid_post")], torch.arange(2.0, 10, 2))


@pytest.mark.parametrize("name", ["refusal.svec", "vectors.json", "vectors.npz", "vectors"])
def test_other_endings_are_named(name, tmp_path):
    (tmp_path / name).write_text('{"directions": {"1": [1, 2, 3, 4]}}', encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}, whose ending is none of .gguf"):
        read_vectors(tmp_path / name)


# ---------------------------------------------------------------- rows and blocks


def hidden_state_rows():
    """As persona vectors are saved: a row for the embeddings, then one for the output of each block."""
    return torch.randn(DEPTH + 1, WIDTH, generator=torch.Generator().manual_seed(0))


def test_a_row_of_hidden_states_goes_to_the_block_before(llm, tmp_path):
    rows, path = hidden_state_rows(), tmp_path / "persona.pt"
    torch.save(rows, path)
    for layers in ([3], [2, 3], [0]):
        with pytest.raises(UserError, match=r"row 3 .model.row. is for the output of block 2.*counted from 0"):
            read_vectors(path, layers, 3, DEPTH)
    read = read_vectors(path, [2], 3, DEPTH).vectors
    assert torch.equal(read[Site(2, "resid_post")], rows[3])
    # The definition: a hidden state of transformers at index 3 is the output of block 2.
    seen = {}
    ids = torch.tensor([llm.token_ids("What is it?")])
    handle = Site(2, "resid_post").hook(llm.model, lambda hidden: seen.update(hidden=hidden))
    states = llm.model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(states[3], seen["hidden"])


def test_a_matrix_of_concepts_keeps_its_rows(tmp_path):
    matrix = torch.randn(DEPTH + 2, WIDTH)
    torch.save(matrix, tmp_path / "concepts.pt")
    assert torch.equal(read_vectors(tmp_path / "concepts.pt", [3], 3, DEPTH).vectors[Site(3, "resid_post")], matrix[3])


@pytest.mark.parametrize("layers", [None, [2]])
def test_vectors_by_hidden_state_are_rejected_even_if_some_are_taken(layers, tmp_path):
    torch.save(dict(enumerate(hidden_state_rows())), tmp_path / "persona.pt")
    with pytest.raises(UserError, match=r"vector for block 4, but the model has blocks 0..3.*embeddings"):
        read_vectors(tmp_path / "persona.pt", layers, None, DEPTH)


def test_the_command_rejects_with_exit_status_2_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(hidden_state_rows(), tmp_path / "persona.pt")
    options = ["--model.llm=demo", "--model.vectors=persona.pt", "--model.row=3", "--data.test_size=4"]
    assert main(["test", "--method=vectors", *options, "--model.vector_layers=[3]"]) == 2
    assert "model.vector_layers to [2]" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["persona.pt"]
