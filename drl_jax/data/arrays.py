"""Examples as arrays in NumPy and CSV files: reads them, and checks that they can be learned.

`config.data.name` names the file: 'npz:/path/file.npz', 'npy:/path/file.npy' or
'csv:/path/file.csv'. The rank of an example decides what it is:

- [D]: a vector, of any numbers;
- [L, C]: a signal of length L with C channels, of any numbers;
- [H, W, C]: a square image, grey or RGB: uint8 in 0..255, or floats in [-1, 1];
- [D, H, W, C]: a volume whose three sides are equal, of any numbers.

Nothing is unpickled, so a file cannot run code.
"""

import csv
import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Num

from drl_jax.data import image_files
from drl_jax.errors import UserError, as_user_error

KINDS = {1: "vector", 2: "signal", 3: "image", 4: "volume"}  # by the rank of an example
WANTED = (
    "give vectors [n, D], signals [n, L, C], images [n, H, W, C] or volumes [n, D, H, W, C]"
)
CHANNELS = (1, 3)  # of images: grey and RGB
CHUNK = 2**22  # values that are checked at once, to limit memory
EXAMINED = 10_000  # rows of a table in which columns of labels are searched
MAGIC = b"\x93NUMPY"  # first bytes of a .npy file
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0
}  # by version; others have 4-byte lengths
FEW = 10  # largest number of different values of such a column


class Arrays(NamedTuple):
    """The arrays in a file.

    Attributes:
      x: the examples; if possible in a memory map, which is read on demand (`read`).
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
    """Statistics of each feature: a column of a table, or a channel.

    Attributes:
      low: smallest value.
      high: largest value.
      mean: mean.
      std: standard deviation.
    """

    low: Float[np.ndarray, "C"]
    high: Float[np.ndarray, "C"]
    mean: Float[np.ndarray, "C"]
    std: Float[np.ndarray, "C"]


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

    Arrays on disk that are not compressed, those of `np.save` and `np.savez`, are mapped into
    memory: only their headers are read here, and they can be larger than memory. Compressed
    arrays, tables in .csv files, and files in a bucket are read into memory.

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


def checked(title: str, found: Arrays) -> tuple[Arrays, Statistics | None]:
    """Checks all values of arrays except 8-bit pixels.

    Labels become int64.

    Args:
      title: names the arrays in messages.
      found: arrays, as they are in a file.

    Returns:
      the arrays, and the statistics of x unless it contains images.

    Raises:
      UserError: naming an array of another kind, an array of another length
        or shape than x, a value that is missing or infinite, a feature that is constant, or a
        label that is missing.
    """
    _require_shape(title, "x", found.x)
    _require_values(title, "x", found.x)
    statistics = None
    if not are_images(found.x):
        statistics = _statistics(found.x)
        _require_spread(title, statistics, found)
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


def are_images(x: np.ndarray) -> bool:
    """Returns whether x are images [n, H, W, C]."""
    return x.ndim == 4


def are_bytes(x: np.ndarray) -> bool:
    """Returns whether x are images with 8-bit pixels."""
    return are_images(x) and x.dtype == np.uint8


def label_like(x: Num[np.ndarray, "n D"]) -> list[int]:
    """Returns the indices of the columns of a table that look like labels, not measurements.

    They have whole numbers, at most `FEW` different ones, in the first `EXAMINED` rows.
    """
    rows = np.asarray(x[:EXAMINED])
    whole = np.flatnonzero((rows == np.round(rows)).all(axis=0))
    return [j for j in whole.tolist() if len(np.unique(rows[:, j])) <= FEW < len(rows)]


def column(columns: Sequence[str], index: int, rank: int = 1) -> str:
    """Returns how a message names a column of a table, or a channel of longer examples."""
    if rank > 1:
        return f"channel x[..., {index}]"
    return f"column {columns[index]!r}" if columns else f"column x[:, {index}]"


def _read_npz(file: epath.Path) -> Arrays:
    """Reads the fields x, y, x_test and y_test; others are ignored."""
    in_bucket = image_files.is_bucket(file)
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) == MAGIC:
            raise ValueError("it contains a single array; give it as npy:PATH")
        with zipfile.ZipFile(io.BytesIO(file.read_bytes()) if in_bucket else opened) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if "x" not in members:
                has = ", ".join(map(repr, members)) or "none"
                raise ValueError(
                    f"it has no field 'x' (its fields: {has}); save it by np.savez(path, x=x)"
                )

            def member(field: str) -> np.ndarray | None:
                if field not in members:
                    return None
                info = members[field]
                if not in_bucket and info.compress_type == zipfile.ZIP_STORED:
                    opened.seek(info.header_offset + 26)  # to the lengths of a name and extras
                    return _mapped(file, opened.tell() + 4 + sum(_lengths(opened)))
                with archive.open(info) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)

            x = member("x")
            assert x is not None
            return Arrays(x, member("y"), member("x_test"), member("y_test"))


def _lengths(opened: BinaryIO) -> tuple[int, int]:
    """Reads the last two numbers of a header in a zip file: lengths of what follows it."""
    first, second = struct.unpack("<HH", opened.read(4))
    return first, second


def _read_npy(file: epath.Path) -> Arrays:
    """Maps an array into memory, or reads it from a bucket."""
    if image_files.is_bucket(file):
        return Arrays(np.lib.format.read_array(io.BytesIO(file.read_bytes())))
    return Arrays(_mapped(file, 0))


def _mapped(file: epath.Path, start: int) -> np.ndarray:
    """Maps the array in .npy format that begins at a position of a file into memory."""
    with file.open("rb") as opened:
        opened.seek(start)
        version = np.lib.format.read_magic(opened)
        read_header = HEADERS.get(version, np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = read_header(opened)
        offset = opened.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they could run code")
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    order: Literal["F", "C"] = "F" if fortran else "C"
    return np.memmap(file, dtype, "r", offset, shape, order)


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
    """Raises a UserError unless x contains examples of one of the `KINDS`."""
    has = f"{title} has {name} of shape {x.shape} and type {x.dtype}"
    example = x.shape[1:]
    if x.dtype.kind not in "iuf":
        raise UserError(f"{has}, which are not real numbers; {WANTED}")
    if not x.size:
        raise UserError(f"{has}, which is empty; {WANTED}")
    if not example:
        raise UserError(f"{has}, without an axis for the values of an example; {WANTED}")
    if len(example) not in KINDS:
        raise UserError(f"{has}, with too many axes; {WANTED}")
    if len(example) == 2 and example[0] == example[1] and x.dtype == np.uint8:
        raise UserError(f"{has}; if these are grey images, add an axis for it: x[..., None]")
    if len(example) > 2 and len(set(example[:-1])) > 1:
        raise UserError(f"{has}, with sides of different lengths; crop or pad them to be equal")
    if not are_images(x):
        return
    if example[2] not in CHANNELS:
        raise UserError(f"{has}: images have 1 (grey) or 3 (RGB) channels, along the last axis")
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
    as_images = are_images(x)
    for start, chunk in _chunks(x):
        wrong = ~(np.abs(chunk) <= 1) if as_images else ~np.isfinite(chunk)
        if wrong.any():
            index = np.argwhere(wrong)[0]
            value = chunk[tuple(index)]
            index[0] += start
            advice = (
                "scale images to [-1, 1], or give them as uint8 in 0..255"
                if as_images and np.isfinite(value)
                else "leave out examples with missing values, and give finite numbers"
            )
            raise UserError(f"{title} has {name}{index.tolist()} = {value:g}; {advice}")


def _statistics(x: Num[np.ndarray, "n *D"]) -> Statistics:
    """Returns the statistics of each feature, along the last axis."""
    C = x.shape[-1]
    low, high = np.full(C, np.inf), np.full(C, -np.inf)
    total, squares = np.zeros(C), np.zeros(C)
    origin = np.asarray(x[0], np.float64).reshape(-1, C)[0]  # a large mean costs no precision
    for _, chunk in _chunks(x):
        rows = chunk.reshape(-1, C)
        low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        shifted = rows - origin
        total += shifted.sum(axis=0)
        squares += np.square(shifted).sum(axis=0)
    n = x.size // C
    mean = total / n
    variance = np.maximum(squares / n - mean**2, 0)
    return Statistics(low, high, origin + mean, np.sqrt(variance))


def _require_spread(title: str, statistics: Statistics, found: Arrays) -> None:
    """Raises a UserError if a feature is constant."""
    constant = np.flatnonzero(statistics.low == statistics.high)
    if constant.size:
        index = int(constant[0])
        others = f", as are {constant.size - 1} others" if constant.size > 1 else ""
        raise UserError(
            f"{title}: {column(found.columns, index, found.x.ndim - 1)} is constant "
            f"({statistics.low[index]:g})"
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
