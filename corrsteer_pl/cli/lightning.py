"""The command line: ``fit``, ``validate``, ``test``, ``predict`` by LightningCLI, ``doctor``, and plain functions."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from transformers.utils import logging as transformers_logging

from corrsteer_pl.cli.arguments import (
    SUBCOMMANDS,
    given_options,
    run_folder,
    with_checkpoint,
    with_found_configs,
    with_whole_dicts,
)
from corrsteer_pl.cli.progress import Progress
from corrsteer_pl.commands.doctor import examine
from corrsteer_pl.commands.train_saes import train_saes_on
from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.evaluation.tables import measures_table, metrics_table, show
from corrsteer_pl.files import check_writable, write_atomically
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.methods.run_files import RunFiles

COMMANDS: dict[str, Callable] = {"train_saes": train_saes_on}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence on standard error and the exit status 2."""
    args = list(sys.argv[1:] if args is None else args)
    quieten_lightning()
    try:
        if args and args[0] in COMMANDS:
            auto_cli(COMMANDS[args[0]], args=args[1:], as_positional=False, parser_class=_Parser)
        elif args and args[0] == "doctor":
            _diagnose(with_found_configs(args))
        else:
            _check_command(args)
            args = with_found_configs(args)
            _Cli(with_whole_dicts(with_checkpoint(args)), given_options(args))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        return 2
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    except MisconfigurationException as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    except SIGTERMException:
        # Lightning ends with status 0, which a job scheduler takes for success.
        return _stopped(signal.SIGTERM)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except SystemExit as end:
        # Lightning's own end after Ctrl-C.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        return _stopped(signal.SIGINT)
    return 0


def _stopped(how: signal.Signals) -> int:
    sys.stderr.write(f"stopped by {how.name}; a fit goes on from its last checkpoint with --ckpt_path last\n")
    return 128 + how


def _check_command(args: Sequence[str]) -> None:
    known = [*SUBCOMMANDS, "doctor", *COMMANDS]
    if args and not args[0].startswith("-") and args[0] not in known:
        raise UserError(f"the command {args[0]!r} is not known; choose one of {choices(known)}.")


def _diagnose(args: list[str]) -> None:
    cli = _Cli(with_whole_dicts(args[1:]), given_options(args), run=False)
    for item in examine(cli.model, cli.datamodule, cli.trainer):
        show(item)
    show("A fit would start.")


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{one_line(message)} See --help for what is allowed.") from ex


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when the fit has come to its end, lest a refused one spoil an earlier run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet: what follows may still be refused."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            config = Path(trainer.default_root_dir) / "config.yaml"
            write_atomically(config, lambda file: file.write_text(text, encoding="utf-8"))


class _Cli(LightningCLI):
    def __init__(self, args: list[str], given: dict[str, Any], run: bool = True) -> None:
        self._given = given
        super().__init__(
            CorrSteer,
            TaskDataModule,
            parser_class=_Parser,
            args=args,
            run=run,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            trainer_defaults={
                "max_epochs": 1,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunFiles, "results")
        parser.set_defaults({"results.every_n_train_steps": 50})

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint override the user; with_checkpoint has put it below.
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        fitting = self.subcommand == "fit"
        if config.get("ckpt_path") and "ckpt_path" not in self._given:
            raise UserError("ckpt_path stands in a configuration; give it on the command line with --ckpt_path.")
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(run_folder(self._given))
        check_writable(Path(config.trainer.default_root_dir))
        if config.trainer.logger is None:
            config.trainer.logger = fitting and _csv_logger(config.trainer.default_root_dir)
        if "verbose" in config:
            config.verbose = False

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        # Before other processes start, each of which would say the same.
        self.model.check_processes(self.trainer.world_size)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self._get(self.config_init, "trainer")
        if options.enable_progress_bar is not False:
            kwargs["callbacks"] = [*(options.callbacks or []), Progress()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"the trainer cannot be set up: {one_line(error)}") from error

    @property
    def _written(self) -> str:
        written = self._get(self.config_init, "results").written
        return f"Written to {written}." if written else "A trial run: nothing was written."

    def _show(self, *items: Any) -> None:
        if self.trainer.is_global_zero:
            show(*items)

    def after_fit(self) -> None:
        self._show(*self.model.tables(), self._written)

    def after_validate(self) -> None:
        self._show(*self.model.tables())

    def after_test(self) -> None:
        metrics = self.model.metrics
        title = f"Test of {self.datamodule.hparams['task']}, {self.model.task.reward_name}"
        self._show(metrics_table(title, metrics))
        if metrics["measures"]:
            self._show(measures_table(metrics["measures"]))
        self._show(self._written)

    def after_predict(self) -> None:
        self._show(self._written)


def _csv_logger(folder: str) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder, "name": "logs"}}


def quieten_lightning() -> None:
    """Leave errors, and warnings that a user can act on."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    unavoidable = (
        "`LightningModule.configure_optimizers` returned `None`",
        r"`isinstance\(treespec, LeafSpec\)`",
        "LightningCLI's args parameter is intended",
    )
    for message in unavoidable:
        warnings.filterwarnings("ignore", message=f".*{message}")
