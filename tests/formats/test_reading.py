"""Vectors of other programs are read as those meant them, and no code in a file is run."""

import dataclasses
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.control_vector import write_gguf
from corrsteer_pl.formats.reading import read_vectors, site_of, vectors_of_object
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.sites import Site

ONE, TWO = torch.arange(1.0, 5), torch.arange(2.0, 6)
AT = {Site(1, "resid_post"): ONE, Site(3, "resid_post"): TWO}
HOOK = {"steering_coefficient": 2.0, "action": "add", "bias": None, "head_index": None}


@dataclasses.dataclass
class SteeringVector:
    """As the package steering-vectors has it."""

    layer_activations: dict
    layer_type: str = "decoder_block"


def saved_object(path, layer_type="decoder_block"):
    module = ModuleType("steering_vectors.steering_vector")
    sys.modules |= {"steering_vectors": ModuleType("steering_vectors"), module.__name__: module}
    SteeringVector.__module__, module.SteeringVector = module.__name__, SteeringVector
    try:
        torch.save(SteeringVector({1: ONE, 3: TWO}, layer_type), path)
    finally:
        del sys.modules[module.__name__], sys.modules["steering_vectors"]


WRITERS = {
    "repeng.gguf": lambda path: write_gguf({1: ONE, 3: TWO}, "llama", path),
    "own.safetensors": SteeringVectors(AT, Schedule("first_k", 3, 0.5)).save,
    "blocks.safetensors": lambda path: save_file({"layer_1": ONE, "layer_3": TWO}, path),
    "lm_eval.pt": lambda path: torch.save(
        {
            "layers.1": {**HOOK, "steering_vector": ONE / 2},
            "model.vector_layers.3": {**HOOK, "steering_vector": TWO / 2},
        },
        path,
    ),
    "blocks.pt": lambda path: torch.save({1: ONE, 3: TWO}, path),
    "rows.pt": lambda path: torch.save({1: ONE[None], 3: TWO[None]}, path),
    "names.pth": lambda path: torch.save({"transformer.h.1": ONE, "transformer.h.3": TWO.half()}, path),
    "float8.pt": lambda path: torch.save({1: ONE.to(torch.float8_e4m3fn), 3: TWO.to(torch.float8_e5m2)}, path),
    "object.pt": saved_object,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_is_read_as_it_was_meant(name, tmp_path):
    WRITERS[name](tmp_path / name)
    found = read_vectors(tmp_path / name)
    assert list(found.vectors) == list(AT)
    for site, vector in found.vectors.items():
        assert torch.equal(vector, AT[site])
        assert vector.dtype == torch.float32
    assert found.schedule == (Schedule("first_k", 3, 0.5) if name == "own.safetensors" else None)
    assert list(read_vectors(tmp_path / name, [3]).vectors) == [Site(3, "resid_post")]
    with pytest.raises(UserError, match="has no vector for block 2; it has 1, 3"):
        read_vectors(tmp_path / name, [2])


def test_one_tensor_needs_a_block_and_a_matrix_a_row(tmp_path):
    torch.save(ONE, tmp_path / "one.pt")
    torch.save({"weight": torch.stack([ONE, TWO])}, tmp_path / "axbench_weight.pt")
    save_file({"vector": ONE}, tmp_path / "one.safetensors")
    torch.save(ONE[None], tmp_path / "row.pt")
    for name in ("one.pt", "one.safetensors", "row.pt"):
        assert torch.equal(read_vectors(tmp_path / name, [2]).vectors[Site(2, "resid_post")], ONE)
        for layers in (None, [1, 2]):
            with pytest.raises(UserError, match=r"does not say for which block. Name the block .* model.vector_layers"):
                read_vectors(tmp_path / name, layers)
    with pytest.raises(UserError, match="is a tensor of 4; a vector is needed"):
        read_vectors(tmp_path / "one.pt", [2], row=0)
    matrix = tmp_path / "axbench_weight.pt"
    assert torch.equal(read_vectors(matrix, [2], row=1).vectors[Site(2, "resid_post")], TWO)
    with pytest.raises(UserError, match=r"is a matrix of 2 x 4, and no model.row says which of its rows 0..1 steers"):
        read_vectors(matrix, [2])
    with pytest.raises(UserError, match="model.row is 2, which does not say which of its rows"):
        read_vectors(matrix, [2], row=2)


@pytest.mark.parametrize("name", ["one.pt", "one.safetensors"])
def test_a_single_row_is_for_the_block_that_its_name_says(name, tmp_path):
    save = {"one.pt": torch.save, "one.safetensors": save_file}[name]
    save({"layers.1": ONE[None].clone()}, tmp_path / name)
    for layers in (None, [1]):
        ((site, vector),) = read_vectors(tmp_path / name, layers).vectors.items()
        assert site == Site(1, "resid_post")
        assert torch.equal(vector, ONE)
    with pytest.raises(UserError, match="has no vector for block 3; it has 1"):
        read_vectors(tmp_path / name, [3])


def test_sites_other_than_outputs_of_blocks_are_known(tmp_path):
    names = {"layers.1.mlp": ONE, "layers.2.self_attn": TWO, "blocks.3.hook_resid_pre": ONE}
    save_file({name: vector.clone() for name, vector in names.items()}, tmp_path / "sites.safetensors")
    found = read_vectors(tmp_path / "sites.safetensors").vectors
    assert list(found) == [Site(1, "mlp_out"), Site(2, "attn_out"), Site(3, "resid_pre")]


@pytest.mark.parametrize(
    "name",
    [
        "3", "direction.3", "layer3", "layer_3", "layers.3", "model.layers.3", "model.vector_layers.3",
        "transformer.h.3", "blocks.3.hook_resid_post",
    ],
)  # fmt: skip
def test_a_name_with_one_number_says_the_block(name):
    assert site_of(name) == Site(3, "resid_post")


@pytest.mark.parametrize("name", ["layer_1_pos_2", "layer_1_coef_3", "model.layers.3.mlp.experts.7", "3.0", "gpt2.h.3"])
def test_a_name_with_several_numbers_says_no_block(name):
    with pytest.raises(ValueError, match=rf"'{name}' has several numbers, so its block is not clear"):
        site_of(name)


@pytest.mark.parametrize(("layer_type", "kind"), {"self_attn": "attn_out", "mlp": "mlp_out"}.items())
def test_an_object_steers_after_the_part_that_it_names(layer_type, kind, tmp_path):
    saved_object(tmp_path / "object.pt", layer_type)
    read = read_vectors(tmp_path / "object.pt")
    taken = vectors_of_object(SteeringVector({1: ONE, 3: TWO}, layer_type))
    for found in (read, taken):
        assert list(found.vectors) == [Site(1, kind), Site(3, kind)]


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[0]).with_name("evil"),)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program")])
    torch.save({1: Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({1: Evil()}))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a .pt file of steering vectors") as told:
            read_vectors(tmp_path / name)
        assert "weights_only" not in str(told.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("none.pt", lambda path: None, "which is no file. Name a file of steering vectors"),
        ("some.svec", lambda path: path.write_text("{}", encoding="utf-8"), "whose ending is none of .gguf"),
        ("text.gguf", lambda path: path.write_text("{}", encoding="utf-8"), "cannot be read as a .gguf file"),
        ("other.safetensors", WRITERS["lm_eval.pt"], "cannot be read as a .safetensors file"),
        ("a.pt", lambda path: torch.save({1: torch.zeros(4)}, path), "no vector that is not zero"),
        ("b.pt", lambda path: torch.save({1: ONE * torch.nan}, path), "a vector at blocks.1.* that is not finite"),
        ("c.pt", lambda path: torch.save({1: ONE, 2: torch.ones(5)}, path), "vectors of different widths"),
        ("d.pt", lambda path: torch.save({1: ONE.long()}, path), r"int64 of shape \(4,\)"),
        ("e.pt", lambda path: torch.save({1: ONE, "name": "x"}, path), "'name' names no block"),
        ("l.pt", lambda path: torch.save({1: ONE, 2: "x"}, path), "2 is a str, and no tensor"),
        ("f.pt", lambda path: torch.save({"happy": ONE, "sad": TWO}, path), "'happy' names no block of a model"),
        ("g.pt", lambda path: torch.save([1, 2], path), "holds a list, and no tensors"),
        ("h.pt", lambda path: torch.save({"layers.1": {**HOOK, "steering_vector": ONE, "action": "clamp"}}, path),
         "the action 'clamp'"),
        ("i.pt", lambda path: torch.save({"layers.1": {**HOOK, "steering_vector": ONE, "head_index": 2}}, path),
         "a bias or a head_index"),
        ("j.pt", lambda path: torch.save({"layers.1": ONE, "model.layers.1": TWO}, path),
         "layers.1 and model.layers.1 are both for blocks.1.hook_resid_post"),
        ("m.pt", lambda path: saved_object(path, "input_layernorm"),
         "its layer_type is 'input_layernorm', and vectors can only be added at decoder_block, self_attn, mlp"),
        ("n.pt", lambda path: torch.save({3.0: ONE}, path),
         "3.0 is a float; a block is named by a string or an integer"),
        ("o.pt", lambda path: torch.save({3.0: ONE, 4.0: TWO}, path), "3.0 is a float"),
        ("p.pt", lambda path: torch.save({"layer_1_pos_2": ONE, "layer_1_pos_3": TWO}, path), "has several numbers"),
        ("q.pt", lambda path: torch.save({-1: ONE}, path),
         "-1 names a block by a negative number; blocks are counted from 0"),
        ("r.pt", lambda path: torch.save({1: ONE, "layers.-1": TWO}, path), "layers.-1 names a block by a negative"),
        ("s.pt", lambda path: torch.save({1: ONE.to_sparse()}, path), "1 is sparse or nested; save a dense tensor"),
        ("t.pt", lambda path: torch.save(ONE[None].to_sparse(), path), "its tensor is sparse or nested"),
        ("u.pt", lambda path: torch.save({"layers.1": {**HOOK, "steering_vector": ONE.to_sparse()}}, path),
         "the steering_vector of layers.1 is sparse or nested"),
        ("v.pt", lambda path: torch.save({1: ONE.to("meta")}, path),
         "1 was saved from the meta device, so it has a shape and no numbers"),
        ("w.pt", lambda path: torch.save({"weight": torch.ones(2, 4, device="meta")}, path), "weight was saved from"),
        ("x.pt", lambda path: torch.save({1: ONE.double() * 1e300}, path), "that is not finite in float32"),
        ("y.pt", lambda path: torch.save({1: ONE.double() * 1e-300}, path), "no vector that is not zero in float32"),
        ("k.pt", lambda path: path.write_bytes(b""), "torch.save did not write it"),
    ],
)  # fmt: skip
def test_what_is_no_steering_vector_is_one_sentence(name, write, sentence, tmp_path):
    write(tmp_path / name)
    with pytest.raises(UserError, match=sentence):
        read_vectors(tmp_path / name)


@pytest.mark.parametrize(
    "changed", [{"positions": "nowhere"}, {"decay": "nan"}, {"decay": "fast"}, {"first_k": "0"}, {"first_k": None}]
)
def test_impossible_metadata_are_the_files_and_not_the_users(changed, tmp_path):
    told = {"positions": "all", "first_k": "1", "decay": "1.0", "format": "pt", **changed}
    given = {name: value for name, value in told.items() if value is not None}
    save_file({"layers.1": ONE}, tmp_path / "other.safetensors", metadata=given)
    with pytest.raises(UserError, match=r"the metadata of .*other.safetensors say \{.*\}, but positions is") as error:
        read_vectors(tmp_path / "other.safetensors")
    ((name, value),) = changed.items()
    assert f"'{name}': {value!r}" in str(error.value)
    assert "model.decay" not in str(error.value)


def test_a_model_in_gguf_is_no_control_vector(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output_norm.weight", ONE.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="its architecture is 'llama', so it is a model and no control vector"):
        read_vectors(tmp_path / "model.gguf")


def test_objects_in_memory_are_taken_as_they_are():
    found = vectors_of_object(SteeringVector({1: ONE, 3: TWO}))
    assert found.vectors.keys() == AT.keys()
    assert found.schedule.positions == "all"
    with pytest.raises(UserError, match="a list holds no vectors by block"):
        vectors_of_object([ONE])
    with pytest.raises(UserError, match="a SteeringVector cannot be taken .*: its layer_type is 'input_layernorm'"):
        vectors_of_object(SteeringVector({1: ONE}, "input_layernorm"))
    with pytest.raises(UserError, match="a dict cannot be taken for steering vectors: 'happy' names no block"):
        vectors_of_object({"happy": ONE})
