"""Hand a run on to another program, with the measured difference between what it does there and here."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.files import check_writable, write_json, write_whole
from corrsteer_pl.formats.biases import alone
from corrsteer_pl.formats.parity import Answers, Parity
from corrsteer_pl.formats.registry import FORMATS
from corrsteer_pl.interventions.steering import require_effect
from corrsteer_pl.methods.answers.answering import EVERYWHERE
from corrsteer_pl.methods.runs.loading import Fit, load_fit
from corrsteer_pl.methods.runs.provenance import versions
from corrsteer_pl.methods.steering import Steering

# Prompts on which the difference is measured.
PROMPTS = 4


def export(run: Path, to: Literal["gguf", "peft", "merged", "lm_eval", "easysteer"], out: Path | None = None) -> None:
    """Write a run in a format of other programs, and measure how far it does the same there.

    A file with what was measured is written beside it. What does not do the same is not left there.

    Args:
        run: Folder of a run, such as checkpoints/demo, or a checkpoint.
        to: gguf: control vector for llama.cpp. peft: adapter for PeftModel.from_pretrained. merged: ordinary
            checkpoint; also for changed weights of rosi, crisp and finetune. lm_eval: for lm-eval's steered model.
            easysteer: control vector and request for EasySteer.
        out: Where to write; in the run's folder, below export, if left out.
    """
    if out is not None and out.exists():
        raise UserError(f"--out is {out}, which exists already. Name a new place, or remove it.")
    ending = FORMATS[to].ending
    if out is not None and ending and out.suffix != ending:
        raise UserError(f"--out is {out}, but what {to} writes is a file that ends with {ending}.")
    fit = load_fit(run)
    place = out or fit.folder / "export" / FORMATS[to].artefact.format(run=fit.name)
    check_writable(place.parent, "--out")
    prompts = [fit.prompt_ids([text]) for text in fit.questions(PROMPTS)]
    parity = (_steering if isinstance(fit.method, Steering) else _weights)(fit, to, place, prompts)
    beside = place.with_name(f"{place.name}.parity.json")
    write_json(beside, {"format": to, "run": fit.name, **asdict(parity), "versions": versions()})
    show(f"Written to {place}: {parity}.", *_remarks(fit, to, place))


def _steering(fit: Fit, to: str, place: Path, prompts: list[list[int]]) -> Parity:
    """Export vectors."""
    method: Any = fit.method
    vectors, format = method.steering_vectors(), FORMATS[to]
    require_effect(vectors, fit.folder, "export")
    llm = method.llm
    unchanged = Answers.of(llm.model, prompts, nullcontext())
    ours = Answers.of(llm.model, prompts, _changed(fit))
    found = []

    def write(new: Path) -> None:
        if not format.ending:
            new.mkdir()
        format.write(llm, vectors, new, method.schedule)
        with format.opened(llm, new) as model:
            found.append(Parity.between(unchanged, ours, Answers.of(model, prompts, nullcontext()), format.read_by))
        found[0].require(llm.model.dtype)

    write_whole(place, write)
    return found[0]


def _weights(fit: Fit, to: str, place: Path, prompts: list[list[int]]) -> Parity:
    """Export changed weights."""
    method: Any = fit.method
    if to != "merged":
        adapter = fit.folder / "adapter"
        has_adapter = (adapter / "adapter_config.json").is_file()
        there = f"; {adapter} is an adapter in peft's format already" if has_adapter else ""
        raise UserError(f"{method.name} changes weights, which {to} cannot say. Choose --to merged{there}.")
    unchanged = Answers.of(method.llm.model, prompts, nullcontext())
    ours = Answers.of(method.llm.model, prompts, _changed(fit))
    found = []

    def write(new: Path) -> None:
        method.merge()
        method.llm.model.save_pretrained(new)
        method.llm.tokenizer.save_pretrained(new)
        with alone(method.llm, new) as model:
            read_by = FORMATS[to].read_by
            found.append(Parity.between(unchanged, ours, Answers.of(model, prompts, nullcontext()), read_by))
        found[0].require(method.llm.model.dtype)

    write_whole(place, write)
    return found[0]


@contextmanager
def _changed(fit: Fit) -> Iterator[None]:
    """The model as the run changes it, at every position."""
    _, changed = fit.compared(EVERYWHERE).groups(1)
    with changed.attached(fit.method.llm.model):
        yield


def _remarks(fit: Fit, to: str, place: Path) -> Iterator[str]:
    yield f"Use it with {FORMATS[to].remark.format(path=place, quoted=quote(str(place)))}"
    schedule = fit.method.schedule if isinstance(fit.method, Steering) else EVERYWHERE
    fades = schedule.decay != EVERYWHERE.decay
    if to != "easysteer" and (fades or schedule.positions != EVERYWHERE.positions):
        strength, option = (f", with a decay of {schedule.decay}", " --model.decay 1") if fades else ("", "")
        yield (
            f"The run steers at positions: {schedule.positions}{strength}; this format steers every position alike. "
            "What that changes:"
        )
        test = f"python -m corrsteer_pl test --ckpt_path {quote(str(fit.checkpoint))}"
        yield f"{test} --model.positions {EVERYWHERE.positions}{option}"
