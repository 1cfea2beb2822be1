"""Examples as arrays in NumPy and CSV files: reads them, and checks that they can be learned.

`config.data.name` names the file: 'npz:/path/file.npz', 'npy:/path/file.npy' or
'csv:/path/file.csv'. The rank of an example decides what it is:

- [D]: a vector, of any numbers;
- [H, W] or [H, W, C]: a square image, grey or RGB: uint8 in 0..255, or floats in [-1, 1].

Signals and volumes are not supported. Nothing is unpickled, so a file cannot run code.
"""

import csv
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Num

from drl_jax.data import image_files
from drl_jax.errors import UserError, as_user_error

CHANNELS = (1, 3)  # of images: grey and RGB
CHUNK = 2**22  # values that are checked at once, to limit memory
EXAMINED = 10_000  # rows of a table in which columns of labels are searched
FEW = 10  # largest number of different values of such a column


class Arrays(NamedTuple):
    """The arrays in a file.

    Attributes:
      x: the examples. Those of a .npy file are in a memory map, which is read on demand.
      y: the label of each example, from 0; or None.
      x_test: examples that training does not use; or None.
      y_test: their labels; or None.
      columns: names of the columns of a table; empty if there are none.
    """

    x: np.ndarray
    y: np.ndarray | None = None
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    columns: Sequence[str] = ()


class Statistics(NamedTuple):
    """Statistics of the columns of a table.

    Attributes:
      low: smallest value.
      high: largest value.
      mean: mean.
      std: standard deviation.
    """

    low: Float[np.ndarray, "D"]
    high: Float[np.ndarray, "D"]
    mean: Float[np.ndarray, "D"]
    std: Float[np.ndarray, "D"]


def is_name(name: str) -> bool:
    """Returns whether `config.data.name` names a file with arrays."""
    return name.partition(":")[0] in READERS and ":" in name


def path_of(name: str) -> epath.Path:
    """Returns the path in `config.data.name`.

    Raises:
      UserError: if there is no such file.
    """
    kind, _, path = name.partition(":")
    if not path:
        raise UserError(
            f"config.data.name is {name!r}, without a path; give '{kind}:/path/file.{kind}'"
        )
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"config.data.name is {name!r}, but there is no such file; give the path of a "
            f".{kind} file"
        )
    return file


def read(name: str) -> Arrays:
    """Reads the arrays in a file, without checking their values (`checked`).

    Of a .npy file on disk, which is memory-mapped, only the header is read. The arrays in a
    .npz file, the table in a .csv file, and files in a bucket are read into memory.

    Args:
      name: 'npz:', 'npy:' or 'csv:', and the path of the file.

    Raises:
      UserError: if there is no such file, it cannot be read or is of another kind, it contains
        Python objects, or a .npz file has no x.
    """
    file = path_of(name)
    kind = name.partition(":")[0]
    with as_user_error(f"cannot read {file} as a .{kind} file"):
        return READERS[kind](file)


def checked(name: str) -> tuple[Arrays, Statistics | None]:
    """Reads the arrays in a file, and checks all values except 8-bit pixels.

    Labels become int64.

    Args:
      name: as for `read`.

    Returns:
      the arrays, and the statistics of x if it is a table.

    Raises:
      UserError: as for `read`; or naming an array that is neither a table nor images, an array
        of another length or shape than x, a value that is missing or infinite, a column that is
        constant, or a label that is missing.
    """
    found = read(name)
    title = repr(name)
    _require_shape(title, "x", found.x)
    _require_values(title, "x", found.x)
    statistics = None
    if found.x.ndim == 2:
        statistics = _statistics(found.x)
        _require_spread(title, statistics, found.columns)
    x_test, y_test = found.x_test, found.y_test
    if x_test is not None:
        _require_shape(title, "x_test", x_test)
        if (x_test.shape[1:], are_bytes(x_test)) != (found.x.shape[1:], are_bytes(found.x)):
            raise UserError(
                f"{title} has x of {found.x.dtype} with examples of shape "
                f"{found.x.shape[1:]}, but x_test of {x_test.dtype} with "
                f"{x_test.shape[1:]}; give both the same shape and type"
            )
        _require_values(title, "x_test", x_test)
    elif y_test is not None:
        raise UserError(f"{title} has y_test but no x_test; add x_test, or remove y_test")
    y = None if found.y is None else _labels(title, "y", found.y, len(found.x))
    if y is not None:
        _require_all_labels(title, y)
    if x_test is not None and y_test is not None:
        y_test = _labels(title, "y_test", y_test, len(x_test))
        if y is None or y_test.max() > y.max():
            raise UserError(
                f"{title} has the label {y_test.max()} in y_test, but not in y; give examples "
                "of all classes in x and y"
            )
    return found._replace(y=y, y_test=y_test), statistics


def outline(name: str) -> np.ndarray | None:
    """Returns zeros with the shape and type of x in a file, in a view that needs no memory.

    None if there are no such examples: `checked` raises an error then. Configurations use it.
    """
    try:
        stamp = path_of(name).stat() if is_name(name) else None
        return _outline(name, stamp.mtime, stamp.length) if stamp else None
    except (UserError, OSError):
        return None


@functools.lru_cache(maxsize=1)  # since several settings follow one file
def _outline(name: str, time: int, size: int) -> np.ndarray:
    """Returns the same for a file that was last changed at this time, and has this size."""
    del time, size
    x = read(name).x
    _require_shape(repr(name), "x", x)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def are_bytes(x: np.ndarray) -> bool:
    """Returns whether x are images with 8-bit pixels."""
    return x.ndim > 2 and x.dtype == np.uint8


def label_like(x: Num[np.ndarray, "n D"]) -> list[int]:
    """Returns the indices of the columns of a table that look like labels, not measurements.

    They have whole numbers, at most `FEW` different ones, in the first `EXAMINED` rows.
    """
    rows = np.asarray(x[:EXAMINED])
    whole = np.flatnonzero((rows == np.round(rows)).all(axis=0))
    return [j for j in whole.tolist() if len(np.unique(rows[:, j])) <= FEW < len(rows)]


def column(columns: Sequence[str], index: int) -> str:
    """Returns how a message names a column of a table."""
    return f"column {columns[index]!r}" if columns else f"column x[:, {index}]"


def _read_npz(file: epath.Path) -> Arrays:
    """Reads the fields x, y, x_test and y_test; others are ignored."""
    archive = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it contains a single array; give it as npy:PATH")
    with archive:
        names = archive.files
        if "x" not in names:
            has = ", ".join(map(repr, names)) or "none"
            raise ValueError(
                f"it has no field 'x' (its fields: {has}); save it by np.savez(path, x=x)"
            )
        y, x_test, y_test = (
            archive[field] if field in names else None for field in ("y", "x_test", "y_test")
        )
        return Arrays(archive["x"], y, x_test, y_test)


def _read_npy(file: epath.Path) -> Arrays:
    """Maps an array into memory, or reads it from a bucket."""
    if image_files.is_bucket(file):
        return Arrays(np.lib.format.read_array(io.BytesIO(file.read_bytes())))
    return Arrays(np.lib.format.open_memmap(file, mode="r"))


def _read_csv(file: epath.Path) -> Arrays:
    """Reads a table of numbers, separated by commas.

    The first line is a header if none of its fields is a number.
    """
    rows: list[list[float]] = []
    columns: list[str] = []
    lines = file.read_bytes().decode("utf-8-sig").splitlines()
    reader = csv.reader(lines, skipinitialspace=True)
    for fields in reader:
        line = reader.line_num
        width = len(rows[0]) if rows else len(columns)
        if not fields:
            continue  # an empty line
        if width and len(fields) != width:
            raise ValueError(f"line {line} has {len(fields)} fields instead of {width}")
        if not width and all(map(_is_text, fields)):
            columns = [field.strip() for field in fields]
            continue
        rows.append([])
        for j, field in enumerate(fields):
            number = _number(field)
            if number is None or not math.isfinite(number):
                place = column(columns, j) if columns else f"field {j + 1}"
                raise ValueError(
                    f"line {line}, {place} is {field!r}; give finite numbers, separated by "
                    "commas, and leave out rows with missing values"
                )
            rows[-1].append(number)
    if not rows:
        raise ValueError("it contains no numbers")
    return Arrays(np.array(rows), columns=columns)


# How the files are read, by the prefix of config.data.name, which is also their suffix. The
# functions raise exceptions of any type, which `read` makes a UserError.
READERS: dict[str, Callable[[epath.Path], Arrays]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "csv": _read_csv,
}


def _number(field: str) -> float | None:
    """Returns the number in a field of a table, or None if it is not one."""
    try:
        return float(field)
    except ValueError:
        return None


def _is_text(field: str) -> bool:
    """Returns whether a field can be the name of a column."""
    return bool(field.strip()) and _number(field) is None


def _require_shape(title: str, name: str, x: np.ndarray) -> None:
    """Raises a UserError unless x is a table of numbers, or square images."""
    has = f"{title} has {name} of shape {x.shape} and type {x.dtype}"
    wanted = "give a table [n, D], or images [n, H, W] or [n, H, W, C]"
    example = x.shape[1:]
    if x.dtype.kind not in "iuf":
        raise UserError(f"{has}, which are not real numbers; {wanted}")
    if not x.size:
        raise UserError(f"{has}, which is empty; {wanted}")
    if not example:
        raise UserError(f"{has}, without an axis for the values of an example; {wanted}")
    if len(example) > 3:
        raise UserError(f"{has}: volumes are not supported; {wanted}")
    if len(example) == 1:
        return
    if example[0] != example[1]:
        raise UserError(
            f"{has}: signals and images that are not square are not supported; crop images to "
            "squares"
        )
    if len(example) == 3 and example[2] not in CHANNELS:
        raise UserError(
            f"{has}: images have 1 (grey) or 3 (RGB) channels, along the last axis, and "
            "volumes are not supported"
        )
    if x.dtype.kind != "f" and x.dtype != np.uint8:
        raise UserError(f"{has}; give images as uint8 in 0..255, or floats in [-1, 1]")


def _chunks(x: np.ndarray) -> Iterator[tuple[int, Num[np.ndarray, "n *D"]]]:
    """Yields (index of the first example, some examples in float32), in order."""
    step = max(1, CHUNK // math.prod(x.shape[1:]))
    for start in range(0, len(x), step):
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            yield start, np.asarray(x[start : start + step], np.float32)


def _require_values(title: str, name: str, x: np.ndarray) -> None:
    """Raises a UserError unless values are finite, and those of images in [-1, 1] if floats."""
    if are_bytes(x):
        return
    are_images = x.ndim > 2
    for start, chunk in _chunks(x):
        wrong = ~(np.abs(chunk) <= 1) if are_images else ~np.isfinite(chunk)
        if wrong.any():
            index = np.argwhere(wrong)[0]
            value = chunk[tuple(index)]
            index[0] += start
            advice = (
                "scale images to [-1, 1], or give them as uint8 in 0..255"
                if are_images and np.isfinite(value)
                else "leave out examples with missing values, and give finite numbers"
            )
            raise UserError(f"{title} has {name}{index.tolist()} = {value:g}; {advice}")


def _statistics(x: Num[np.ndarray, "n D"]) -> Statistics:
    """Returns the statistics of the columns of a table."""
    low, high = np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf)
    total, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    origin = np.asarray(x[0], np.float64)  # so that a large mean costs no precision
    for _, chunk in _chunks(x):
        low = np.minimum(low, chunk.min(axis=0))
        high = np.maximum(high, chunk.max(axis=0))
        shifted = chunk - origin
        total += shifted.sum(axis=0)
        squares += np.square(shifted).sum(axis=0)
    mean = total / len(x)
    variance = np.maximum(squares / len(x) - mean**2, 0)
    return Statistics(low, high, origin + mean, np.sqrt(variance))


def _require_spread(title: str, statistics: Statistics, columns: Sequence[str]) -> None:
    """Raises a UserError if a column of a table is constant."""
    constant = np.flatnonzero(statistics.low == statistics.high)
    if constant.size:
        index = int(constant[0])
        others = f", as are {constant.size - 1} others" if constant.size > 1 else ""
        raise UserError(
            f"{title}: {column(columns, index)} is constant ({statistics.low[index]:g})"
            f"{others}; a constant has no density: remove it"
        )


def _labels(title: str, name: str, y: np.ndarray, n: int) -> Int[np.ndarray, "n"]:
    """Returns labels as int64, one per example.

    Raises:
      UserError: if they are not n whole numbers from 0.
    """
    if y.shape != (n,):
        raise UserError(
            f"{title} has {n} examples, but {name} of shape {y.shape}; give one label per "
            "example"
        )
    if y.dtype.kind not in "iu":
        raise UserError(f"{title} has {name} of {y.dtype}; give labels as integers from 0")
    if y.min() < 0:
        raise UserError(f"{title} has the label {y.min()} in {name}; count labels from 0")
    return y.astype(np.int64)


def _require_all_labels(title: str, y: Int[np.ndarray, "n"]) -> None:
    """Raises a UserError unless the labels are 0..C-1, without a gap."""
    present = np.unique(y)
    missing = np.flatnonzero(present != np.arange(len(present)))
    if missing.size:
        raise UserError(
            f"{title} has labels up to {y.max()}, but no example with the label {missing[0]}; "
            "number the classes 0, 1, 2, ... without gaps"
        )
