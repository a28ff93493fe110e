"""Every kind of SAE computes what its own program computes, or is rejected by its name."""

import json

import numpy as np
import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.sae_formats import AUTOENCODERS, REJECTED, hook_site
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from tests.architectures import WIDTH, make_tiny

D_SAE, K = 48, 5
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def llm(llm):
    return make_tiny("llama", llm.tokenizer)


@pytest.fixture(scope="module")
def residual():
    return 3 * torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(5))


def options_of(config, **options):
    known = {"k": K, "d_out": WIDTH, "n_heads": 2, "bottleneck_factor": 1, "max_iterations": 4}
    known |= {"matryoshka_widths": [16, D_SAE]}
    return {name: value for name, value in {**known, **options}.items() if name in config.__dataclass_fields__}


def make(architecture, registry=SAE_CLASS_REGISTRY, hook=HOOK, **options):
    """An autoencoder of SAELens with random weights."""
    cls, config = registry[architecture]
    metadata = options.pop("metadata", {"hook_name": hook})
    sae = cls(config(d_in=WIDTH, d_sae=D_SAE, metadata=SAEMetadata(**metadata), **options_of(config, **options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() if "threshold" in name else values)
    return sae


def loaded(folder, llm, **options):
    (sae,) = load_saes(str(folder), llm, **options).values()
    return sae


# ---------------------------------------------------------------- SAELens


@pytest.mark.parametrize("architecture", SAE_CLASS_REGISTRY)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_every_architecture_is_read_as_saelens_reads_it_or_rejected(architecture, normalize, llm, residual, tmp_path):
    # Transcoders have no bias to take from their input.
    sae = make(architecture, normalize_activations=normalize, apply_b_dec_to_input="transcoder" not in architecture)
    sae.save_model(tmp_path / HOOK)
    if architecture not in AUTOENCODERS:
        with pytest.raises(UserError, match=f"architecture '{architecture}'.*{REJECTED[architecture]}"):
            load_saes(str(tmp_path), llm)
        return
    found = loaded(tmp_path, llm)
    with torch.no_grad():
        activations = sae.encode(residual)
        expected = sae.decode(activations)
        assert (activations != 0).any()
        # Activations in units of the residual stream: their directions and the bias add up to the reconstruction.
        parts = found.encode(residual) @ torch.stack([found.direction(i) for i in range(D_SAE)])
        zero = torch.zeros_like(activations)
        sae.encode(residual)  # decode takes the mean and the scale of the last input
        torch.testing.assert_close(parts, expected - sae.decode(zero), rtol=1e-4, atol=1e-3)
        if normalize == "none":
            torch.testing.assert_close(found.encode(residual), activations)
        reconstruction, active = found.reconstruct(residual)
    torch.testing.assert_close(reconstruction, expected)
    assert torch.equal(active, (activations != 0).sum(-1))
    assert found.site == found.declared == Site(1, "resid_post")


@pytest.mark.parametrize("architecture", SAE_TRAINING_CLASS_REGISTRY)
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set:UserWarning")
def test_a_training_checkpoint_is_what_saelens_makes_of_it_or_rejected(architecture, llm, residual, tmp_path):
    make(architecture, SAE_TRAINING_CLASS_REGISTRY).save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/activations_store_state.safetensors").write_bytes(b"")
    if architecture in REJECTED:
        with pytest.raises(UserError, match=f"architecture '{architecture}'.*save_inference_model"):
            load_saes(str(tmp_path), llm)
    else:
        found = loaded(tmp_path, llm)
    # The conversion that the message names.
    TrainingSAE.load_from_disk(tmp_path / "checkpoint").save_inference_model(tmp_path / "inference")
    reference = SAE.load_from_disk(tmp_path / "inference")
    converted = loaded(tmp_path / "inference", llm)
    with torch.no_grad():
        expected = reference.encode(residual)
        torch.testing.assert_close(converted.encode(residual), expected)
        if architecture not in REJECTED:
            torch.testing.assert_close(found.encode(residual), expected)


def configure(folder, remove=(), **settings):
    config = folder / "cfg.json"
    before = json.loads(config.read_text(encoding="utf-8"))
    after = {key: value for key, value in {**before, **settings}.items() if key not in remove}
    config.write_text(json.dumps(after), encoding="utf-8")


def relu_features(folder, residual):
    """By the definition of a standard autoencoder, in numpy."""
    W = {name: weight.double().numpy() for name, weight in load_file(folder / "sae_weights.safetensors").items()}
    return np.maximum((residual.double().numpy() - W["b_dec"]) @ W["W_enc"] + W["b_enc"], 0)


@pytest.mark.parametrize("key", ["hook_point", "hook_name"])
def test_folders_of_old_versions_are_read(key, llm, residual, tmp_path):
    make("standard").save_model(tmp_path / "sae")
    removed = ["metadata", "architecture", "normalize_activations", "reshape_activations"]
    configure(tmp_path / "sae", removed, **{key: HOOK, "hook_point_layer": 1, "activation_fn_str": "relu"})
    found = loaded(tmp_path, llm)
    assert found.site == Site(1, "resid_post")
    np.testing.assert_allclose(found.encode(residual).numpy(), relu_features(tmp_path / "sae", residual), atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "site"),
    {
        "model.layers.1": Site(1, "resid_post"),
        "transformer.h.1": Site(1, "resid_post"),
        "gpt_neox.layers.1": Site(1, "resid_post"),
        "layers.1": Site(1, "resid_post"),
        "h.1": Site(1, "resid_post"),
        "model.language_model.layers.1": Site(1, "resid_post"),
        "layers.1.mlp": Site(1, "mlp_out"),
        "model.layers.1.self_attn": Site(1, "attn_out"),
        "gpt_neox.layers.1.attention": Site(1, "attn_out"),
        "blocks.1.hook_mlp_out": Site(1, "mlp_out"),
        "blocks.1.hook_attn_out": Site(1, "attn_out"),
        "blocks.1.hook_in": Site(1, "resid_pre"),
        "blocks.1.hook_out": Site(1, "resid_post"),
        "blocks.1.mlp.hook_out": Site(1, "mlp_out"),
    }.items(),
)
def test_hooks_of_other_programs_are_known(hook, site, llm, tmp_path):
    assert hook_site(hook, "sae") == site
    make("standard", hook=hook).save_model(tmp_path / "sae")
    assert loaded(tmp_path, llm).site == site


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_in",
        "hook_embed", "model.layers.1.mlp.down_proj", "model.layers.1.input_layernorm", "model.embed_tokens",
        "resid_post_layer_1",
    ],
)  # fmt: skip
def test_hooks_that_are_no_site_are_named(hook, llm, tmp_path):
    make("standard", hook=hook).save_model(tmp_path / "sae")
    with pytest.raises(UserError, match=f"{hook}.*cannot be steered here; supported are blocks"):
        load_saes(str(tmp_path), llm)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "cfg.json names no hook. Set metadata.hook_name"),
        ({"hook_name": ""}, "cfg.json names no hook. Set metadata.hook_name"),
        ({"hook_name": None, "hook_layer": 1}, "names no hook .hook_layer is 1."),
        ({"hook_name_in": HOOK}, f"names no hook .hook_name_in is '{HOOK}'."),
        ({"hook_name": HOOK, "hook_name_out": "blocks.1.hook_mlp_out"}, "hook_name_out 'blocks.1.hook_mlp_out'"),
        ({"hook_name": HOOK, "hook_head_index": 0}, "hook_head_index 0"),
        ({"hook_name": HOOK, "hook_layer": 2}, "hook_layer 2"),
    ],
)
def test_metadata_of_no_single_site_are_rejected(metadata, message, llm, tmp_path):
    make("standard", metadata=metadata).save_model(tmp_path / "sae")
    with pytest.raises(UserError, match=message) as raised:
        load_saes(str(tmp_path), llm)
    assert str(tmp_path / "sae") in str(raised.value)


def test_harmless_metadata_are_accepted(llm, tmp_path):
    metadata = {"hook_name": HOOK, "hook_name_out": HOOK, "hook_layer": 1, "hook_head_index": None, "prepend_bos": True}
    make("standard", metadata=metadata).save_model(tmp_path / HOOK)
    assert loaded(tmp_path, llm).site == Site(1, "resid_post")


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        ("blocks.2.hook_resid_post", {}, "of layer 1, but its folder is of layer 2"),
        ("sae", {"architecture": "crosscoder"}, "architecture 'crosscoder'.*several layers"),
        ("sae", {"architecture": "invented"}, "architecture 'invented'"),
        ("sae", {"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        ("sae", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ("sae", {"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
    ],
)
def test_settings_that_change_what_is_computed_are_rejected(folder, settings, message, llm, tmp_path):
    make("standard").save_model(tmp_path / folder)
    configure(tmp_path / folder, **settings)
    with pytest.raises(UserError, match=message):
        load_saes(str(tmp_path), llm)


def test_a_module_before_a_norm_is_rejected(tmp_path, llm):
    gemma = make_tiny("gemma2", llm.tokenizer)
    make("standard", hook="model.layers.1.mlp").save_model(tmp_path / "sae")
    with pytest.raises(UserError, match=r"'model.layers.1.mlp'.*post_feedforward_layernorm"):
        load_saes(str(tmp_path), gemma)


# ---------------------------------------------------------------- other programs


def save_sparsify(folder, **settings):
    """As ``SparseCoder.save_to_disk`` of sparsify writes it."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"encoder.weight": (D_SAE, WIDTH), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, WIDTH), "b_dec": (WIDTH,)}
    folder.mkdir(parents=True)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": WIDTH, **settings,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return {name: weight.double().numpy() for name, weight in weights.items()}


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "h.1"])
@pytest.mark.parametrize("latents", [{}, {"num_latents": 0, "expansion_factor": D_SAE / WIDTH}])
def test_sparsify_is_read_by_its_definition(name, latents, llm, residual, tmp_path):
    W = save_sparsify(tmp_path / "run" / name, **latents)
    found = loaded(tmp_path / "run", llm)
    assert found.site == Site(1, "mlp_out" if name.endswith("mlp") else "resid_post")
    left = np.maximum((residual.double().numpy() - W["b_dec"]) @ W["encoder.weight"].T + W["encoder.bias"], 0)
    smallest = np.sort(left, -1)[..., -K, None]
    expected = np.where(left >= smallest, left, 0)
    np.testing.assert_allclose(found.encode(residual).numpy(), expected, rtol=1e-4, atol=1e-4)
    reconstruction, _ = found.reconstruct(residual)
    np.testing.assert_allclose(reconstruction.numpy(), expected @ W["W_dec"] + W["b_dec"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transcode": True}, "sparsify.*transcode true"),
        ({"skip_connection": True}, "sparsify.*skip_connection true"),
        ({"activation": "groupmax"}, "sparsify.*'groupmax'"),
        ({"k": None}, "sparsify.*lacks d_in, k"),
        ({"k": D_SAE + 1}, "k = 49 of 48"),
    ],
)
def test_sparsify_of_another_kind_is_rejected(settings, message, llm, tmp_path):
    save_sparsify(tmp_path / "layers.1", **settings)
    with pytest.raises(UserError, match=message):
        load_saes(str(tmp_path), llm)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["layer_1/width_16k/average_l0_59/params.npz"], "Gemma Scope"),
        (["layer_1_width_16k_l0_small/config.json", "layer_1_width_16k_l0_small/params.safetensors"], "Gemma Scope 2"),
        (["L1R-8x/hyperparams.json", "L1R-8x/checkpoints/final.safetensors"], "Llama Scope"),
        (["layer1.sae.pt"], "Qwen Scope"),
        (["trainer_0/config.json", "trainer_0/ae.pt"], "dictionary_learning"),
        (["runner_cfg.json"], "a training checkpoint of SAELens"),
        (["layer_1.pt"], "PyTorch or numpy files"),
    ],
)
def test_other_formats_are_named_with_the_conversion(files, name, llm, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"in the format {name}.*SAE.save_model\(folder\)"):
        load_saes(str(tmp_path), llm)


def test_a_release_of_transcoders_is_rejected_before_it_is_downloaded(llm):
    for release in ("gemma-scope-2b-pt-transcoders", "mwhanna-qwen3-4b-transcoders"):
        with pytest.raises(UserError, match=f"{release} has the architecture '.*transcoder'"):
            load_saes(release, llm)
