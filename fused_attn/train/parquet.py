"""Folders in the hub's Parquet layout: which file is in which split, and what the labels in each of them mean."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import pyarrow
import pyarrow.parquet

from .decode import no_file, one_line
from .errors import TrainError

#: What the name of a Parquet file begins with -> its split.
_SPLIT_NAMES = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation"), "validation")}


def files_of_splits(data_dir: Path) -> dict[str, list[str]]:
    """Split -> its files, as ``datasets`` takes them.

    Raises:
        TrainError: there are none, one is no regular file, or one is in two splits.
    """
    import datasets

    found = [path for path in data_dir.rglob("*.parquet") if not path.is_dir()]
    for path in found:
        if other := no_file(path):
            raise TrainError(f"data_dir {data_dir}: {one_line(str(path))} must be a regular file, got {other}")
    if not found:
        what = "no folder" if not data_dir.is_dir() else "a folder without Parquet files"
        raise TrainError(f"data_dir must be a folder with the data set's Parquet files, got {what}: {data_dir}")
    if glob.has_magic(str(data_dir)):  # datasets takes the path for a pattern
        raise TrainError(f"data_dir must be a path without * ? [ for Parquet files, got {data_dir}")
    # datasets takes a file for that of every split whose name is a word of its path, its folders' names included.
    split_of: dict[str, str] = {}
    data_files = datasets.load_dataset_builder(str(data_dir)).config.data_files
    for split, files in data_files.items():
        for file in files:
            own = _SPLIT_NAMES.get(re.match(r"[a-z]*", Path(file).name.lower())[0], split)
            for other in (split_of.setdefault(file, split), own if split in _SPLIT_NAMES.values() else split):
                if other != split:
                    raise TrainError(
                        f"data_dir {data_dir}: {file} must be in one split by its name and its folders', "
                        f"got {other} and {split}; rename it or them"
                    )
    return {split: list(files) for split, files in data_files.items()}


def check_labels(data_dir: Path, files: Sequence[str], column: str, names: Sequence[str] | None) -> None:
    """Refuse files whose labels mean different things.

    ``datasets`` takes the names of the classes from one file and applies them to the labels of all others.

    Args:
        data_dir: for the error's text.
        files: of the splits that are used.
        column: of the labels.
        names: of the classes, as ``datasets`` took them; None where it has none.

    Raises:
        TrainError: names two files, and the first class that they number differently.
    """
    schemas = {file: pyarrow.parquet.read_schema(file) for file in files if file.endswith(".parquet")}
    named = {file: found for file, schema in schemas.items() if (found := _class_names(schema, column)) is not None}
    if named and names is not None:
        named["what datasets takes for all of them"] = list(names)
    _check_numbers(data_dir, named, column)
    kinds: dict[bool, str] = {}
    for file, schema in schemas.items():
        if column in schema.names:
            kinds.setdefault(_is_text(schema.field(column).type), file)
    if len(kinds) > 1 or (True in kinds and names is not None):
        others = f"numbers in {kinds[False]}" if False in kinds else "the classes of the data set's card are numbers"
        raise TrainError(
            f"data_dir {data_dir}: the labels in the column {column} must be of one kind, got texts in {kinds[True]} "
            f"and {others}"
        )


def _check_numbers(data_dir: Path, named: Mapping[str, Sequence[str]], column: str) -> None:
    first = next(iter(named), "")
    for file, names in named.items():
        for number, (one, other) in enumerate(zip_longest(named[first], names)):
            if one != other:
                one, other = ("none" if name is None else repr(name) for name in (one, other))
                raise TrainError(
                    f"data_dir {data_dir}: all files must number the classes in the column {column} alike, got for "
                    f"class {number} {one} in {first} and {other} in {file}"
                )


def _class_names(schema: pyarrow.Schema, column: str) -> list[str] | None:
    """The names of a column's classes that ``datasets`` wrote into a file, in their order."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((described.get("info") or {}).get("features") or {}).get(column)
    return feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
