"""Reading rows from files, and writing results atomically."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any, TextIO

from safetensors import SafetensorError

from corrsteer_pl.errors import UserError, choices, one_line

# The checkpoint of a run.
LAST = "last.ckpt"
# Bytes that a file system allows for a name.
LONGEST_NAME = 255


def exists(path: str) -> bool:
    """Whether a path names something on this machine."""
    try:
        return bool(path) and Path(path).exists()
    except OSError:
        # Too long for a name, for example.
        return False


def absolute(path: str) -> str:
    """A path on this machine made absolute, so that a checkpoint finds it from anywhere; any other name as it is."""
    return str(Path(path).absolute()) if exists(path) else path


def check_writable(folder: Path, option: str = "--trainer.default_root_dir") -> None:
    """Check that results can be written below a folder that need not exist yet; makes nothing.

    Args:
        folder: The folder.
        option: What names it.

    Raises:
        UserError: They cannot.
    """
    instead = f"Set {option} to a folder that can."
    if "\0" in str(folder) or any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise UserError(f"{folder} cannot be written: a part of its name is too long, or no name at all. {instead}")
    nearest = next(place for place in (folder, *folder.absolute().parents) if exists(str(place)))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{folder} cannot be written: {nearest} is no folder, or not yours to write. {instead}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises:
        UserError: The folder cannot be made or written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Set --trainer.default_root_dir to a folder that can."
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``folder``, then put it in its place."""

    def fill(new: Path) -> None:
        new.mkdir()
        write(new)

    write_whole(folder, fill)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or a folder of the same name within a temporary folder, then put it in its place.

    If it fails, folders that were made for it are gone again. Its files have the usual mode, whatever wrote them.

    Raises:
        UserError: There is no room, or no right.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    missing = [folder for folder in path.parents if not exists(str(folder))]
    try:
        # In a container, a process that was killed had the same number.
        rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        made = scratch / path.name
        write(made)
        # safetensors writes files that their owner alone can read.
        usual = scratch.stat().st_mode & 0o666
        for file in (made, *made.rglob("*")):
            if file.is_file():
                file.chmod(usual)
        if path.is_dir():
            rmtree(path)
        made.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or one_line(error)}). Name another place."
        ) from error
    finally:
        rmtree(scratch, ignore_errors=True)
        # Only an empty folder can be removed so.
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()


def write_utf8(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands in a file between the comments ``<!-- mark -->`` and ``<!-- end of mark -->``.

    Raises:
        UserError: The file lacks the comments, or cannot be written.
    """
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    before, _, rest = whole.partition(first)
    if last not in rest:
        raise UserError(f"{path} has no place for a table. Put {first} and {last} into it, each on a line of its own.")
    write_utf8(path, f"{before}{first}\n{text}{last}{rest.partition(last)[2]}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON document, indented."""
    write_utf8(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_utf8(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def ending(path: Path) -> str:
    """The ending of a file's name that tells its format, in lower case.

    Example:
        >>> ending(Path("Age.test.jsonl")), ending(Path("train.CSV.gz")), ending(Path("notes"))
        ('.jsonl', '.csv.gz', '')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    double = "".join(suffixes)
    return double if double in READERS else suffixes[-1] if suffixes else ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL, JSON, CSV, TSV or parquet file, by its ending; see :func:`read_located_rows`."""
    return [row for _, row in read_located_rows(path)]


def read_located_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a file, by its ending, each with its location in the file, such as ``line 3``.

    Raises:
        UserError: There is no such regular file, its ending is unknown, or a line is broken (with its number).
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file. Set data.path to one.")
    kind = ending(path)
    if kind not in READERS:
        raise UserError(f"{path} is none of the kinds that can be read ({choices(READERS)}). Set data.path to one.")
    try:
        return READERS[kind](path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error.strerror or error)}). Set data.path to a readable file."
        ) from error
    except (ValueError, OverflowError, csv.Error, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no valid {kind[1:]} file ({one_line(error)}).") from error


def parsed_json(text: str) -> Any:
    r"""Parse JSON.

    Raises:
        ValueError: It is no JSON, has too large integers, is nested too deeply, or cannot be written as UTF-8.

    Example:
        >>> parsed_json('["half a character: \\ud83d"]')
        Traceback (most recent call last):
        ValueError: half of a surrogate pair, '\ud83d'
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


LocatedRows = list[tuple[str, dict[str, Any]]]


def _opened(path: Path, newline: str | None = None) -> TextIO:
    """A text file in UTF-8, with or without a byte order mark, decompressed if it ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path) -> LocatedRows:
    rows = []
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parsed_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no valid JSON ({error}). Mend or remove the line.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}.")
            rows.append((f"line {number}", row))
    return rows


def _read_json(path: Path) -> LocatedRows:
    """A list of objects, the same under the name ``data``, or one object a line."""
    with _opened(path) as file:
        text = file.read()
    try:
        value = parsed_json(text)
    except ValueError:
        return _read_jsonl(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(
            f"{path} holds no list of objects. "
            'Write it as [{"column": value}, ...], as {"data": [...]}, or as JSONL.'
        )
    return [(f"row {number}", row) for number, row in enumerate(value, start=1)]


def _read_csv(path: Path) -> LocatedRows:
    with _opened(path, newline="") as lines:
        delimiter = "\t" if ".tsv" in path.name.lower()[-7:] else ","
        reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
        names = list(reader.fieldnames or [])
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"{path} has two columns {twice[0]!r}. Give each another name.")
        rows = []
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more values than columns ({len(names)}). Put a value that has "
                    "commas into quotes."
                )
            if any("\0" in value for value in row.values() if value is not None):
                raise UserError(f"{path}, line {reader.line_num}: a NUL character. Save the file as text in UTF-8.")
            rows.append((f"line {reader.line_num}", row))
        return rows


def _read_parquet(path: Path) -> LocatedRows:
    # Imported here because it is slow to import and most runs do not need it.
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


READERS: dict[str, Callable[[Path], LocatedRows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".tsv": _read_csv,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
    ".tsv.gz": _read_csv,
}
# Endings of tables, whose cells have no types.
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
