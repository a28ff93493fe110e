"""What a checkpoint says of its own origin, and whether it belongs to the model, the options and the data at hand."""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices

KEY = "corrsteer_pl"
FORMAT = 4
LIBRARIES = ("corrsteer_pl", "torch", "lightning", "transformers", "sae-lens")


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from.

    Attributes:
        method: Name of the method that was fitted.
        llm: Name and fingerprint of the language model.
        saes: Name and fingerprints of the autoencoders; None for a method without.
        settled: Options of the method that a fit settles: no later stage may have others.
        resumed: Options of the method that a fit can only go on with.
        samples: Fingerprint of the samples of the fit.
        counted: How many of them were counted.
        versions: Versions of the libraries.
        state: What the method itself stores.
        format: Version of this record.
    """

    method: str
    llm: dict[str, Any]
    saes: dict[str, Any] | None
    settled: dict[str, Any]
    resumed: dict[str, Any]
    samples: str
    counted: int
    versions: dict[str, str]
    state: dict[str, Any]
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> Self:
        """The record in a checkpoint.

        Raises:
            UserError: The checkpoint is of another program or of another format, or the record is damaged.
        """
        plain = checkpoint.get(KEY)
        if not isinstance(plain, dict):
            raise UserError("the checkpoint was not written by corrsteer_pl. Give the last.ckpt of a fit.")
        if (found := plain.get("format", 1)) != FORMAT:
            raise UserError(
                f"the checkpoint has format {found}, but this version of corrsteer_pl reads format {FORMAT}. "
                "Fit again, or use the version that wrote it."
            )
        kinds = {"method": str, "llm": dict, "settled": dict, "resumed": dict, "samples": str, "counted": int}
        kinds |= {"versions": dict, "state": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(plain.get(name), kind)]
        wrong += [] if isinstance(plain.get("saes", 0), (dict, type(None))) else ["saes"]
        wrong += ["llm"] if "llm" not in wrong and not {"name", "fingerprint"} <= plain["llm"].keys() else []
        if wrong or set(plain) != {field.name for field in fields(cls)}:
            raise damaged(f"its record has no usable {choices(wrong)}" if wrong else "its record has other fields")
        return cls(**plain)


def damaged(what: str) -> UserError:
    """The sentence for a checkpoint that cannot be relied on."""
    return UserError(f"the checkpoint is damaged: {what}. Fit again to make a new one.")


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    return {name: version(name) for name in LIBRARIES}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds; every byte is compared with the checksums in the file.

    Raises:
        UserError: No such file, a damaged one, or one of another program or format.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {str(path)!r} does not exist. Give the last.ckpt of a fit with --ckpt_path.")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever is in the file, it is not a checkpoint; torch.load raises many kinds.
        raise UserError(
            f"the checkpoint {str(path)!r} is damaged or none at all. Fit again to make a new one."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"the checkpoint {str(path)!r} was not written by corrsteer_pl. Give the last.ckpt of a fit.")
    Provenance.read(checkpoint)
    return checkpoint


def settings_of(checkpoint: Mapping[str, Any]) -> tuple[Provenance, dict[str, dict[str, Any]]]:
    """The record of a checkpoint, and the options ``model`` and ``data`` that it was made with.

    Raises:
        UserError: It is damaged.
    """
    names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    found = {part: checkpoint.get(key) for part, key in names.items()}
    if wrong := [part for part, options in found.items() if not isinstance(options, dict)]:
        raise damaged(f"it has no options of the {wrong[0]}")
    plain = {part: {k: v for k, v in (some or {}).items() if not k.startswith("_")} for part, some in found.items()}
    return Provenance.read(checkpoint), plain


def check_method(stored: str, own: str) -> None:
    """Refuse the checkpoint of another method.

    Raises:
        UserError: Naming both.
    """
    if stored != own:
        raise UserError(
            f"the checkpoint was fitted by the method {stored}, but the method is {own}. Leave out --method, or fit "
            "again."
        )


def check_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a change of options that the fit settled.

    Raises:
        UserError: Naming the option and both values.
    """
    for name, value in stored.items():
        if value != given.get(name):
            raise UserError(
                f"model.{name} is {given.get(name)}, but the checkpoint was fitted with {value}, which a fit settles. "
                "Leave it out, or fit again."
            )


def check_llm(stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse another model; the same weights under another path are the same model.

    Raises:
        UserError: Naming both models.
    """
    if own["fingerprint"] != stored["fingerprint"]:
        raise UserError(
            f"the checkpoint was fitted on the model {stored['name']}, but model.llm is {own['name']}, which has "
            "other weights. Use the checkpoint's model, or fit again."
        )


def check_saes(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse other autoencoders, or others of their layers.

    Raises:
        UserError: Naming both, with their layers.
    """
    if own["fingerprints"] != stored["fingerprints"]:
        raise UserError(
            f"the checkpoint was fitted with the SAEs {stored['name']} (layers {choices(stored['fingerprints'])}), but "
            f"model.saes is {own['name']} (layers {choices(own['fingerprints'])}), which differ. "
            "Use the checkpoint's, or fit again."
        )


def check_counter(counted: int, counts: Mapping[str, float]) -> None:
    """Refuse a checkpoint whose sums have other samples than it counts.

    Args:
        counted: Number of samples that the checkpoint counts.
        counts: Number of samples in each of its sums, by the name of the sum.

    Raises:
        UserError: Naming the first that differs.
    """
    for name, count in counts.items():
        if count != counted:
            raise UserError(
                f"the checkpoint counts {counted} samples, but its sums ({name}) have {count:g}, so a step was "
                "interrupted when it was written. Go on from an earlier checkpoint, or fit from the beginning without "
                "--ckpt_path."
            )


def check_samples(stored: str, own: str) -> None:
    """Refuse to go on with a fit on samples that have changed, by their fingerprints.

    Raises:
        UserError: They differ.
    """
    if stored != own:
        raise UserError(
            "the samples of the fit are no longer those that the checkpoint has counted some of. Restore the data, or "
            "fit from the beginning without --ckpt_path."
        )


def check_same_data(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a fit on other data; the batch size alone may change.

    Raises:
        UserError: Naming the option and both values.
    """
    for name, value in given.items():
        if name != "batch_size" and name in stored and stored[name] != value:
            raise UserError(
                f"data.{name} is {value}, but the checkpoint was fitted with {stored[name]}; a fit can only go on with "
                "its own data. Leave it out, or fit from the beginning without --ckpt_path."
            )


def check_directions(directions: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a checkpoint without a usable direction, ``(d_model,)``, for each of its candidates.

    Raises:
        UserError: Naming the first that is missing, of another shape, or not finite.
    """
    for name in names:
        direction = directions.get(name)
        if not isinstance(direction, Tensor) or direction.ndim != 1 or not direction.isfinite().all():
            raise damaged(f"it has no usable direction for the feature {name}")
