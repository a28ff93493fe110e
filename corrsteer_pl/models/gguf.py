"""Language models in a GGUF file, on this machine or in a repository on the Hugging Face Hub."""

import mmap
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from transformers.utils import logging as transformers_logging

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import exists

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Bytes of each type of metadata value but strings and arrays.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# Metadata without which there is no tokenizer.
TOKENIZER = {"tokenizer.ggml.model", "tokenizer.ggml.tokens"}
# Factors of the rotary frequencies, which transformers leaves out.
FREQUENCIES = "rope_freqs.weight"


def is_gguf(name: str) -> bool:
    """Whether the name of a model means a GGUF file rather than a folder or a repository.

    Example:
        >>> is_gguf("owner/repository/model.Q8_0.gguf"), is_gguf("owner/repository")
        (True, False)
    """
    return name.lower().endswith(".gguf") and not (exists(name) and Path(name).is_dir())


@contextmanager
def source(name: str, revision: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where transformers' ``from_pretrained`` finds a model; a GGUF file is downloaded if needed, and checked.

    Args:
        name: A GGUF file, as a local path or ``owner/repository/path/file.gguf`` on the Hub; any other name of a model
            is left to transformers.
        revision: Branch, tag or commit on the Hub.

    Yields:
        A folder or repository, and options.

    Raises:
        UserError: There is no such file, it is broken, or has no tokenizer, or packages are missing.
    """
    if not is_gguf(name):
        yield name, {}
        return
    if any(find_spec(package) is None for package in ("gguf", "accelerate")):
        raise UserError("models in GGUF files need the 'gguf' extra: pip install 'corrsteer_pl[gguf]'.")
    file = _find(name, revision)
    header = _checked(name, file)
    if FREQUENCIES in header.ends:
        warnings.warn(
            f"{name} scales its rotary frequencies ({FREQUENCIES}), which transformers leaves out of GGUF files, so "
            "answers can differ from those of the original model.",
            stacklevel=4,
        )
    _follow_transformers_progress_bars()
    # From an empty folder, for transformers prefers a tokenizer.json beside the file to what the file says. The path
    # is absolute because a file of the same name in the working directory would come first.
    with TemporaryDirectory() as empty:
        yield empty, {"gguf_file": str(file.absolute())}


def dequantisation() -> dict[str, Any]:
    """Options of ``from_pretrained`` by which a model becomes one of plain weights, which can be saved."""
    # Versions of transformers without it do so anyway.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _find(name: str, revision: str | None) -> Path:
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if exists(name):
        return Path(name)
    if not (owner and repository and path) or owner in (".", "..", "~"):
        raise UserError(
            f"there is no file {name!r}. Set model.llm to the path of a GGUF file, or to owner/repository/file.gguf "
            "for one on the Hugging Face Hub."
        )
    return Path(hf_hub_download(f"{owner}/{repository}", path, revision=revision))


@dataclass
class _Header:
    """What stands before the weights.

    Attributes:
        version: Version of the format.
        keys: Names of the metadata.
        ends: Place of the end of each tensor, in bytes from the first one's beginning.
        start: Where the first tensor begins in the file, at the earliest.
    """

    version: int
    keys: set[str]
    ends: dict[str, int]
    start: int


def _checked(name: str, file: Path) -> _Header:
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise UserError(
                f"{name} is no GGUF file: it does not begin with GGUF. Set model.llm to one, or to a folder."
            )
    try:
        header = _read_header(file)
        complete = max(header.ends.values(), default=0) + header.start <= file.stat().st_size
    except (struct.error, OverflowError, UnicodeDecodeError, KeyError):
        complete = False
    if not complete:
        raise UserError(f"the GGUF file {name} is cut short or damaged. Download it again.")
    if header.version not in VERSIONS:
        raise UserError(f"{name} is GGUF of version {header.version}; 2 and 3 can be read. Convert the model anew.")
    if not header.keys >= TOKENIZER:
        raise UserError(f"the GGUF file {name} has no tokenizer. Set model.llm to one that has both.")
    return header


def _read_header(file: Path) -> _Header:
    sizes = import_module("gguf").GGML_QUANT_SIZES
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, len(MAGIC))
        at = len(MAGIC) + struct.calcsize("<IQQ")
        if version not in VERSIONS:
            return _Header(version, set(), {}, at)
        keys: set[str] = set()
        for _ in range(n_keys):
            key, at = _string(data, at)
            keys.add(key)
            at = _after_value(data, at + 4, *struct.unpack_from("<I", data, at))
        ends = {}
        for _ in range(n_tensors):
            name, at = _string(data, at)
            (n_dims,) = struct.unpack_from("<I", data, at)
            *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
            at += 4 + struct.calcsize(f"<{n_dims}QIQ")
            numbers, width = sizes[kind]
            ends[name] = offset + prod(shape) // numbers * width
    return _Header(version, keys, ends, at)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    """A string that begins with its length, and the place after it."""
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    return data[at + 8 : end].decode(), end


def _after_value(data: mmap.mmap, at: int, kind: int) -> int:
    """The place after a metadata value; large arrays are skipped."""
    if kind in WIDTHS:
        return at + WIDTHS[kind]
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != ARRAY:
        raise KeyError(kind)
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in WIDTHS:
        return at + count * WIDTHS[item]
    for _ in range(count):
        at = _after_value(data, at, item)
    return at


def _follow_transformers_progress_bars() -> None:
    """Let the bar of dequantisation, which is tqdm's own, be silenced with the others of transformers."""
    with suppress(ImportError):
        reader = import_module("transformers.modeling_gguf_pytorch_utils")
        reader.tqdm = transformers_logging.tqdm  # type: ignore[attr-defined]
