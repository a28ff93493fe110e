"""Write what a run found as a page, or compare two runs on the same questions."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.render import render
from corrsteer_pl.evaluation.report import context
from corrsteer_pl.evaluation.run import Run
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.evaluation.versus import context_of_two
from corrsteer_pl.files import LAST, check_writable, write_utf8
from corrsteer_pl.methods.runs.provenance import read_checkpoint, settings_of


def report_on(runs: list[Path] | None = None, out: Path | None = None, test: str | None = None) -> None:
    """Write report.html and report.md of a run, or of a second one against it.

    Both files need nothing beside them: no network, no script, no picture.

    Args:
        runs: Folder of a run, such as checkpoints/demo; with a second one, the two are compared in pairs of answers to
            the same questions.
        out: Folder to write into; the run's own, or the second run's own, if left out.
        test: Name of the test that is shown, a folder below test/; left out, that of the fit's own task, or else the
            latest, and of two runs one that both have.
    """
    if runs is None or len(runs) > 2:
        raise UserError(f"report takes the folder of one run, or of two that are compared, not {len(runs or ())}.")
    found = [Run.read(run) for run in runs]
    folder = out or runs[-1]
    check_writable(folder, "--out")
    if len(found) == 2:
        kind, name = "compare", f"report-against-{found[0].name}"
        shown = context_of_two(found[0], found[1], test)
    else:
        kind, name = "report", "report"
        shown = context(found[0], found[0].test(test), _record(runs[0]))
    for ending in ("html", "md"):
        write_utf8(folder / f"{name}.{ending}", render(f"{kind}.{ending}.j2", shown))
    show(shown["verdict"], f"Written to {folder / name}.html and {name}.md.")


def _record(folder: Path) -> dict[str, Any]:
    """Whose the checkpoint is; nothing where it cannot be read, as a report needs none."""
    with suppress(UserError):
        return settings_of(read_checkpoint(folder / LAST))[0].as_dict()
    return {}
