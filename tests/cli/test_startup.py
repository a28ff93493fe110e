"""What comes without importing what is large, and that the help knows the parser's options."""

import json
import os
import subprocess
import sys

import pytest

from corrsteer_pl.cli import lightning, options, program
from corrsteer_pl.cli.program import main
from corrsteer_pl.methods.registry import METHODS
from tests.conftest import run_here

LARGE = ("torch", "lightning", "transformers", "datasets", "sae_lens", "numpy", "scipy", "pyarrow", "jsonargparse")


def loaded(*args, cwd="."):
    """Exit status, and which large modules a command has imported, in an interpreter of its own."""
    code = (
        "import json, sys\nfrom corrsteer_pl.cli.program import main\nstatus = main(json.loads(sys.argv[1]))\n"
        f"sys.stderr.write('\\n' + json.dumps([status, [m for m in {LARGE} if m in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([*map(str, args)])],
        capture_output=True, encoding="utf-8", cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    status, modules = json.loads(done.stderr.splitlines()[-1])
    return status, modules, done.stdout, "".join(done.stderr.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"], ["fit", "--help"], ["train_saes", "-h"]])
def test_help_imports_nothing_large(args):
    status, modules, out, error = loaded(*args)
    assert (status, modules, error.strip()) == (0, [], "")
    assert out.startswith("corrsteer_pl 0" if args == ["--version"] else "usage: python -m corrsteer_pl")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["fitt"],
            "the command 'fitt' is not known; choose one of fit, validate, test, predict, transfer, compare, doctor, "
            "report, ",
        ),
        (["fit", "--config", "nix.yaml"], "the configuration 'nix.yaml' was found neither as given nor in configs/"),
        (["fit", "--config"], "--config needs a configuration file after it"),
        (["fit", "--model.scal", "2"], "there is no option model.scal; the nearest are model.scale,"),
        (["test", "--modle.scale=2"], "there is no option modle.scale; the nearest are model,"),
        (["fit", "--traner.devices", "2"], "there is no option traner.devices; the nearest are trainer,"),
        (["fit", "--trainer.device", "2"], "there is no option trainer.device; the nearest are trainer.devices,"),
        (["fit", "--seed", "2"], "there is no option seed; the nearest are"),
        (
            ["fit", "--method", "corsteer"],
            "the method 'corsteer' is not known; choose one of corrsteer, mean_difference, crisp, finetune, prompting, "
            "rosi, vectors.",
        ),
        (["train_saes", "--lllm", "x"], "there is no option lllm; the nearest are llm,"),
        (["test"], "test needs the checkpoint of a fit. Give it with --ckpt_path"),
    ],
)
def test_misspelt_names_are_told_before_anything_large_is_imported(args, sentence):
    status, modules, _, error = loaded(*args)
    assert status == 2
    assert error.strip().startswith(f"error: {sentence}")
    assert error.strip().count("\n") == 0
    assert modules == [] or args == ["test"]


def test_misspelt_names_in_a_configuration_are_told(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {llm: demo, saess: demo}\n", encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "there is no option model.saess; the nearest are model.saes," in capsys.readouterr().err


def test_the_help_of_the_program_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in program.COMMANDS.items():
        assert f"{name} " in shown
        assert command.does in shown


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_and_parser_have_the_same_options(command, monkeypatch):
    class Caught(Exception):
        pass

    def catch(cli, args):
        raise Caught(cli.parser)

    monkeypatch.setattr(lightning._Cli, "parse_arguments", lambda cli, parser, args: catch(cli, args))
    with pytest.raises(Caught) as caught:
        lightning._Cli("corrsteer", [command], {})
    parser = caught.value.args[0]._subcommands_action._name_parser_map[command]
    real = {action.dest for action in parser._actions if not action.dest.endswith((".help", "==SUPPRESS=="))}
    known = {option.name for group in options.groups(command, "corrsteer").values() for option in group.options}
    parts = {"model", "data", "trainer", "results", "help"}
    assert known - real <= {"print_config"}
    assert real - known - parts <= set(options.UNSHOWN)


def test_a_test_of_a_checkpoint_needs_neither_autoencoders_nor_datasets(tmp_path):
    small = ["--data.train_size=96", "--data.val_size=16", "--data.test_size=8", "--trainer.enable_progress_bar=false"]
    run_here("fit", "--config", "demo.yaml", "--model.layers=[1]", *small, cwd=tmp_path)
    test = ["test", "--ckpt_path", "checkpoints/demo/last.ckpt", "--trainer.enable_progress_bar=false"]
    status, modules, _, _ = loaded(*test, cwd=tmp_path)
    assert status == 0
    assert "torch" in modules
    assert not {"sae_lens", "datasets"} & set(modules)


def test_the_registry_is_what_the_help_offers(capsys):
    assert main(["fit", "--help"]) == 0
    assert f"--method {'|'.join(METHODS)}" in capsys.readouterr().out


def test_help_finds_a_shipped_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "demo.yaml", "--help"]) == 0
    assert "--model.scale" in capsys.readouterr().out


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "0"}])
def test_each_run_tells_its_own_mistake_though_the_port_is_the_same(environment, tmp_path):
    # As with torchrun, a launcher of its own for each run.
    launch = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'corrsteer_pl', 'fitt']))"
    environment = {**os.environ, "MASTER_PORT": "29500", "TMPDIR": str(tmp_path), **environment}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", launch], env=environment, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: the command 'fitt' is not known")


def test_an_interrupt_ends_any_command_without_a_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "main", interrupted)
    assert program.process() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_who_reads_the_output_may_leave():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "corrsteer_pl", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
