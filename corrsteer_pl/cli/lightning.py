"""Lightning's command line: ``fit``, ``validate``, ``test``, ``predict``, and ``doctor``, which prepares a fit."""

import errno
import logging
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from transformers.utils import logging as transformers_logging

from corrsteer_pl.cli.arguments import (
    checkpoint_path,
    flatten,
    given_method,
    given_options,
    run_folder,
    with_checkpoint,
    with_whole_dicts,
)
from corrsteer_pl.cli.parser import OneSentence
from corrsteer_pl.cli.processes import is_told, tell
from corrsteer_pl.cli.progress import Progress
from corrsteer_pl.cli.safe_yaml import check_finite
from corrsteer_pl.cli.tags import tag
from corrsteer_pl.cli.trainer_options import check_trainer
from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation.tables import measures_table, metrics_table, show
from corrsteer_pl.files import LAST, check_writable, write_atomically
from corrsteer_pl.methods.registry import method_class
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.methods.runs.provenance import check_method, read_checkpoint, settings_of
from corrsteer_pl.methods.runs.requeue import requeue_checkpoint

# Trainer options that a test's results are named after.
LIMITS = ("limit_test_batches", "limit_predict_batches")


def run_stage(args: list[str]) -> int:
    """Run a stage of the Trainer, or ``doctor``; the exit status.

    Raises:
        UserError: A mistake of the user.
    """
    return guarded(_diagnose if args[0] == "doctor" else run_once, args)


def guarded(run: Callable[[list[str], dict[str, Any]], object], args: list[str], onwards: str | None = None) -> int:
    """Run what takes arguments, and what they say, with an exit status for whatever may end it.

    Args:
        run: What is run.
        args: The command and its arguments.
        onwards: How to go on after an interruption; None for that of a fit.

    Raises:
        UserError: A mistake of the user.
    """
    quieten_lightning()
    given = given_options(args)
    try:
        run(args, given)
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(one_line(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{run_folder(given)} cannot be written to: {error.strerror}. Make room, and go on.") from error
    except MisconfigurationException as error:
        raise UserError(one_line(error)) from error
    except SIGTERMException:
        # Lightning ends with status 0, which a job scheduler takes for success.
        return _stopped(signal.SIGTERM, given, onwards)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT, given, onwards)
    except SystemExit as end:
        # Lightning turns Ctrl-C into SystemExit.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        return _stopped(signal.SIGINT, given, onwards)
    return 0


def _stopped(how: signal.Signals, given: dict[str, Any], onwards: str | None) -> int:
    if how is signal.SIGTERM and is_told():
        # Lightning's launcher sends SIGTERM to all processes when one has failed.
        return 2
    if onwards is None:
        saved = (run_folder(given) / LAST).is_file()
        onwards = "a fit goes on from its last checkpoint with --ckpt_path last" if saved else "nothing has been saved"
    tell(f"stopped by {how.name}; {onwards}")
    return 128 + how


def run_once(args: list[str], given: dict[str, Any], like: Any = None) -> "_Cli":
    """Run a stage.

    Args:
        args: Its name and its arguments.
        given: What :func:`given_options` says of them.
        like: A method that has run, whose language model is taken over if it was loaded with the same options.

    Returns:
        The command line that has run, with its method as ``model``, its data and its trainer.
    """
    printing = any(argument.partition("=")[0] == "--print_config" for argument in args)
    path = None if printing else checkpoint_path(args[0], given)
    if path is None:
        return _Cli(given_method(args), with_whole_dicts(args), given)
    record, settings = settings_of(read_checkpoint(path))
    method = str(given.get("method", record.method))
    check_method(record.method, method)
    transfer = given.get("data.task", settings["data"].get("task")) != settings["data"].get("task")
    stored = {**settings, "data": {} if transfer else settings["data"]}
    return _Cli(method, with_whole_dicts(with_checkpoint(args, given, stored)), given, stored, like=like)


def run_among_others(args: list[str], given: dict[str, Any], like: Any = None) -> "_Cli":
    """Run a stage after which others follow, as :func:`run_once` does.

    Raises:
        SIGTERMException: The process was told to end.
    """
    cli = run_once(args, given, like)
    if cli.trainer.received_sigterm:
        # Between the batches of a stage Lightning ends it; in the last one it notes the signal and does nothing.
        raise SIGTERMException
    return cli


def _diagnose(args: list[str], given: dict[str, Any]) -> None:
    from corrsteer_pl.commands.doctor import examine

    cli = _Cli(given_method(args), with_whole_dicts(args[1:]), given, run=False)
    for item in examine(cli.model, cli.datamodule, cli.trainer):
        show(item)
    show("A fit would start.")


class Parser(OneSentence, LightningArgumentParser):
    """The parser of Lightning's command line."""


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when a run has come to its end, lest a refused one spoil an earlier run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet: what follows may still be refused."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.starts_a_run:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            config = Path(trainer.default_root_dir) / "config.yaml"
            write_atomically(config, lambda file: file.write_text(text, encoding="utf-8"))


class _Cli(LightningCLI):
    """LightningCLI for one method.

    Args:
        method: Its name.
        args: The command and its arguments, without it for ``run=False``.
        given: What the user gave.
        stored: The options ``model`` and ``data`` of the checkpoint, if there is one.
        run: Whether to run the command.
        like: A method that has run, whose language model is taken over if it was loaded with the same options.
    """

    def __init__(
        self,
        method: str,
        args: list[str],
        given: dict[str, Any],
        stored: dict[str, Any] | None = None,
        run: bool = True,
        like: Any = None,
    ) -> None:
        self._method, self._given, self._stored, self._like = method, given, stored, like
        super().__init__(
            method_class(method),
            TaskDataModule,
            parser_class=Parser,
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
        parser.add_argument("--method", type=str, default=self._method, help="What is fitted.")
        parser.add_lightning_class_args(RunFiles, "results")
        parser.set_defaults({"results.every_n_train_steps": 50})

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's options override the user's; with_checkpoint has already merged them.
        pass

    def _set_seed(self) -> None:
        check_trainer({"seed_everything": self._get(self.config, "seed_everything")}, "fit")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        fitting = self.subcommand == "fit"
        if config.get("ckpt_path") and "ckpt_path" not in self._given:
            raise UserError("ckpt_path stands in a configuration; give it on the command line with --ckpt_path.")
        check_finite(flatten({"model": config.model.as_dict(), "data": config.data.as_dict()}))
        check_trainer(config.trainer.as_dict(), self.subcommand or "fit")
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(run_folder(self._given))
        check_writable(Path(config.trainer.default_root_dir))
        if self.subcommand in ("test", "predict") and config.results.tag is None:
            config.results.tag = self._tag(config.as_dict())
        if config.trainer.logger is None:
            config.trainer.logger = fitting and _csv_logger(config.trainer.default_root_dir)
        if "verbose" in config:
            config.verbose = False

    def _tag(self, config: dict[str, Any]) -> str | None:
        """What the test has otherwise than its fit, or, of another task's data, otherwise than the defaults."""
        defaults = self._parser(self.subcommand or "").get_defaults().as_dict()
        stored = {part: {**defaults[part], **(self._stored or {}).get(part, {})} for part in ("model", "data")}
        options = [f"model.{name}" for name in method_class(self._method).settings.tested]
        options += [f"data.{name}" for name in TaskDataModule.TESTED] + [f"trainer.{name}" for name in LIMITS]
        return tag(config, {**stored, "trainer": defaults["trainer"]}, options)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self._like is not None and _loaded_by(self._like) == _loaded_by(self.model):
            self.model.llm = self._like.llm
        # Check before other processes start, so that the error is raised once.
        self.model.check_processes(self.trainer.world_size)
        if self.subcommand and "ckpt_path" not in self._given:
            path = requeue_checkpoint(Path(self.trainer.default_root_dir))
            if path is not None:
                self._show(f"Resuming from {path}, which this job, or one before it, saved when SLURM ended it.")

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
        counted, samples = self.model.counted, len(self.datamodule.examples["train"])
        if counted < samples and not self.model.trainer.fast_dev_run:
            self._show(
                f"The fit has counted {counted} of {samples} samples: max_time, max_steps or limit_train_batches ended "
                "it. With --ckpt_path last, and without them, it goes on."
            )

    def after_validate(self) -> None:
        self._show(*self.model.tables())

    def after_test(self) -> None:
        metrics = self.model.metrics
        control = self.model.hparams.get("control", "none")
        title = f"Test of {self.datamodule.hparams['task']}, {self.model.task.reward_name}"
        title += "" if control == "none" else f", control {control}"
        self._show(metrics_table(title, {"all": metrics, **metrics["groups"]}))
        if metrics["measures"]:
            self._show(measures_table(metrics["measures"]))
        self._show(self._written)

    def after_predict(self) -> None:
        self._show(self._written)


def _loaded_by(method: Any) -> tuple[Any, ...]:
    """What decides which language model a method loads."""
    return method.llm_name, method.dtype_name, method.llm_args


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
        # A test needs no callback of its fit.
        "Be aware that when using `ckpt_path`, callbacks",
        # A method may keep nothing in parameters or buffers.
        "contains no parameters",
    )
    for message in unavoidable:
        warnings.filterwarnings("ignore", message=f".*{message}")
