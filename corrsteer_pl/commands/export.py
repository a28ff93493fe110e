"""Write a model that a fit has changed, as Hugging Face models are stored."""

from pathlib import Path

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.files import check_writable, write_folder
from corrsteer_pl.methods.provenance import read_checkpoint, settings_of
from corrsteer_pl.methods.registry import method_class
from corrsteer_pl.models.llm import LanguageModel


def export_model(ckpt_path: Path, out: Path) -> None:
    """Write the changed weights of a fit by rosi, crisp or finetune as a folder that any Hugging Face program loads.

    Args:
        ckpt_path: Checkpoint of the fit.
        out: Folder to write; it must not exist, or be empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out is {out}, which exists already. Name a new folder, or remove it.")
    check_writable(out.parent, "--out")
    record, _ = settings_of(read_checkpoint(ckpt_path))
    method = method_class(record.method).load_from_checkpoint(ckpt_path)
    method.llm = LanguageModel.load(method.llm_name, method.dtype_name, **method.llm_args)
    method.check_parts(record)
    method.merge()

    def save(folder: Path) -> None:
        method.llm.model.save_pretrained(folder)
        method.llm.tokenizer.save_pretrained(folder)

    write_folder(out, save)
    show(f"Written to {out}.")
