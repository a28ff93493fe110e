"""Put a run on the Hugging Face Hub: its vectors, what was selected and measured, and a model card that says so."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation.render import render
from corrsteer_pl.evaluation.report import verdict
from corrsteer_pl.evaluation.run import Run
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.files import write_json, write_utf8
from corrsteer_pl.hub import HTTP_ERROR
from corrsteer_pl.interventions.steering import FILE, Schedule, SteeringVectors, require_effect
from corrsteer_pl.methods.checks import leaves_scale_open

# What is raised where nothing answers.
UNREACHED: Any = (HTTP_ERROR, OSError)
# What a model on the Hub is called.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(run: Path, repository: str, private: bool = False, license: str | None = None) -> None:
    """Put the vectors of a run on the Hugging Face Hub, with selection.json, metrics and a model card.

    The token is the one that 'hf auth login' has stored, or HF_TOKEN; it is never shown.

    Args:
        run: Folder of a run, such as checkpoints/demo.
        repository: Where to, as owner/name; it is made if it does not exist.
        private: Whether a new repository is private.
        license: Identifier of a licence for the card, such as apache-2.0; left out, that of the base model counts.
    """
    _check_name(repository)
    found = Run.read(run)
    if not (run / FILE).is_file():
        raise UserError(f"{run} is a fit of {found.method}, which has no vectors. Export it with --to merged instead.")
    vectors = SteeringVectors.load(run / FILE)
    require_effect(vectors.vectors, run, "push")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_utf8(folder / "README.md", card(found, vectors, repository, license))
        vectors.save_pretrained(folder)
        write_json(
            folder / "selection.json", _without_places(json.loads((run / "selection.json").read_text(encoding="utf-8")))
        )
        for name, metrics in found.tests.items():
            write_json(folder / "test" / name / "metrics.json", _without_places(metrics))
        with _told(repository):
            api = HfApi(library_name="corrsteer_pl")
            api.create_repo(repository, private=private or None, exist_ok=True)
            address = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Run {found.name}")
    show(f"Pushed to {getattr(address, 'repo_url', None) or repository}.")


def card(run: Run, vectors: SteeringVectors, repository: str, license: str | None) -> str:
    """The model card of a run, whose verdict is of a test with these vectors, as strong and at the same positions."""
    scale, schedule = run.selection.scale, vectors.schedule
    alike = {name: metrics for name, metrics in run.tests.items() if _is_alike(metrics, scale, schedule)}
    base = run.model if HUB_ID.fullmatch(run.model) and not Path(run.model).exists() else None
    shown = {
        "run": run, "base": base, "model": run.model, "repository": repository, "license": license,
        "verdict": verdict(run, replace(run, tests=alike).test()), "schedule": schedule, "sites": list(vectors.vectors),
        "saes": _without_places(run.selection.saes).get("name"),
    }  # fmt: skip
    return render("model_card.md.j2", shown)


def _is_alike(metrics: Mapping[str, Any], scale: float, schedule: Schedule) -> bool:
    """Whether a test was steered so. Where a fit chose the strength, that one was tested."""
    own = metrics.get("scale", scale)
    where = all(metrics.get(name, value) == value for name, value in vars(schedule).items())
    return where and (leaves_scale_open(own) or own == scale)


def _without_places(value: Any) -> Any:
    """The same without paths of this machine, of which the last part stays."""
    if isinstance(value, dict):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        reason = str(error).partition(":")[0].splitlines()[0].rstrip(".")
        raise UserError(f"{repository!r} is no name of a repository ({reason}). Give it as owner/name.") from error


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Turn what the Hub refuses into one sentence, in which no token stands."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "it knows you not: log in with 'hf auth login', or set HF_TOKEN to a token that may write",
            403: f"you may not write there: choose an owner that is yours in place of {repository.partition('/')[0]}",
        }
        told = reasons.get(status, f"it answered {status}: try again later")
        raise UserError(f"the Hub did not take {repository}: {told}.") from error
    except ValueError as error:
        raise UserError(f"the Hub did not take the model card: {one_line(error)}.") from error
    except UNREACHED as error:
        raise UserError(f"the Hub cannot be reached, so nothing was pushed ({type(error).__name__}).") from error
