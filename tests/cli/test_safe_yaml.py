"""Configurations that are malformed, too large, or ambiguous are one sentence, and quickly so."""

import time
from pathlib import Path

import pytest
import yaml

from corrsteer_pl.cli.program import main
from corrsteer_pl.cli.safe_yaml import check_finite, read_yaml
from corrsteer_pl.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)
BAD = [
    (BOMB, "more than 100000 values"),
    ("a: &a [*a]", "contains itself"),
    ("a: &a {b: *a}", "contains itself"),
    ("model: {scale: 1, scale: 2}", "the name 'scale' stands twice, again in line 1"),
    ("model: {}\ndata: {}\nmodel: {}", "the name 'model' stands twice, again in line 3"),
    (f"a: {'1' * 5000}", "a number of 5000 digits in line 1"),
    ("[" * 5000, "nested deeper than 32 levels"),
    ("[" * 5000 + "]" * 5000, "nested deeper than 32 levels"),
    ('a: "\\ud800"', "half of a surrogate pair"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("a: b: c", "mapping values are not allowed"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD)
def test_malformed_configurations_are_one_sentence(text, sentence, tmp_path, capsys):
    began = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=sentence):
        read_yaml(text)
    assert time.monotonic() - began < 5
    config = tmp_path / "c.yaml"
    config.write_text(text, encoding="utf-8")
    assert main(["fit", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: the configuration {config} is no valid YAML (")
    assert sentence in error


def test_nested_merges_are_refused_or_merged_at_once():
    began = time.monotonic()
    try:
        found = read_yaml(MERGE_BOMB)["a9"]
    except yaml.YAMLError as error:
        found = str(error)
    # PyYAML merges a name once since 6.0.4.
    assert found in ({"k": 1}, "more than 100000 values")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", Path(__file__).parents[2].glob("configs/*.yaml"), ids=lambda path: path.name)
def test_shipped_configurations_are_read_as_by_pyyaml(path):
    text = path.read_text(encoding="utf-8")
    assert read_yaml(text) == yaml.safe_load(text)


def test_plain_yaml_is_read_as_the_parser_reads_it():
    text = "a: 1e3\nb: 1.5e-3\nc: .5\nd: yes\ne: 0x10\nf: 'x'\ng: &g {h: 1}\ni: *g\nj: {<<: *g, k: 2}\nl: 1.0\nm: ~"
    found = read_yaml(text)
    assert found == {
        "a": 1000.0, "b": 0.0015, "c": 0.5, "d": True, "e": 16, "f": "x", "g": {"h": 1}, "i": {"h": 1},
        "j": {"h": 1, "k": 2}, "l": 1.0, "m": None,
    }  # fmt: skip


def test_values_of_the_command_line_are_bounded_too(capsys):
    assert main(["fit", "--config", "demo.yaml", "--model.layers", "[" * 3000]) == 2
    assert "the value of model.layers is no valid YAML (nested deeper" in capsys.readouterr().err


@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-.inf", "inf"])
def test_numbers_have_to_be_finite(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "demo.yaml", "--model.scale", value]) == 2
    assert "model.scale" in capsys.readouterr().err
    with pytest.raises(UserError, match="model.scale is nan; it takes a finite number"):
        check_finite({"model.scale": float("nan")})


def test_parts_hold_options_by_name(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    for text, kind in (("data: [a, b]", "list"), ("model: 3", "int")):
        config.write_text(text, encoding="utf-8")
        assert main(["fit", "--config", str(config)]) == 2
        assert f"has a {kind} for {text.partition(':')[0]}, which takes options by name" in capsys.readouterr().err


def test_a_value_may_override_what_is_merged_wherever_it_stands():
    text = "a: {b: {c: &m {<<: &n {h: 1}, h: 2}}}\nd: {<<: *m}"
    assert read_yaml(text) == yaml.safe_load(text)
