"""Whether a checkpoint belongs to the model, the SAEs, the options and the data at hand."""

from collections.abc import Mapping
from typing import Any

from corrsteer_pl.errors import UserError, choices


def check_settled(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a change of options that the fit settled.

    Raises:
        UserError: Naming the option and both values.
    """
    for name, value in stored.items():
        if value != given[name]:
            raise UserError(
                f"model.{name} is {given[name]}, but the checkpoint was fitted with {value}, which a fit settles. "
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
