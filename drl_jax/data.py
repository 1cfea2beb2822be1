"""Examples: where they lie, how they are prepared, and in which order training sees them.

`config.data.name` names the source: 'digits' (8x8 grey, inside scikit-learn),
'folder:/path' (PNG and JPEG), a TFDS data set that was prepared beforehand in its
ArrayRecord format, or a shape in the plane (`testbeds.PLANE`), whose examples are points
instead of images. TensorFlow is not imported, unless the images lie in a bucket and etils
reads that through it.

Every fault that a user can mend (no such folder, a damaged image, data that are not
prepared) is a `UserError`, also where a prefetching thread meets it.
"""

import difflib
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Num, UInt8
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from drl_jax import testbeds
from drl_jax.errors import UserError

_PILLOW_MODES = {1: "L", 3: "RGB"}

# Each thread makes whole batches. A process that ends waits for those begun or buffered,
# so there are only as many as keep a training step from waiting.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

POINTS = 100_000  # that stand for a shape in the plane
_POINTS_BATCHES = 10  # in which they are drawn: each of 10,000 by 400 components

# For ever. `repeat()` without a number makes grain's length overflow in batches of one.
_EPOCHS = 2**31


class Source(Protocol):
    """Images, or points, at random access.

    Attributes:
      white: the greatest value a pixel can have; black is 0. 0 of points, which have none.
      identity: tells these examples from others.
      folder: where they lie, if that is a folder.
    """

    white: float
    identity: str
    folder: epath.Path | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Num[np.ndarray, "*D"]: ...

    def read(self, indices: Sequence[int]) -> list[Num[np.ndarray, "*D"]]:
        """Returns many at once."""
        return [self[index] for index in indices]


class Digits(Source):
    """The 1797 handwritten digits that come with scikit-learn, 8x8 grey."""

    white = 16.0
    identity = "digits"
    folder = None

    def __init__(self, channels: int):
        from sklearn.datasets import load_digits  # a second, which only this source needs

        _require_channels("'digits'", 1, channels)
        self._images = load_digits().images[..., np.newaxis]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Num[np.ndarray, "8 8 1"]:
        return self._images[index]


class Points(Source):
    """`POINTS` draws of a shape in the plane; the same ones every time."""

    white = 0.0
    folder = None

    def __init__(self, name: str):
        keys = jax.random.split(jax.random.key(0), POINTS)
        draw = jax.jit(testbeds.PLANE[name]().sample)
        self._points = np.concatenate([draw(some) for some in np.split(keys, _POINTS_BATCHES)])
        self.identity = f"{name}, {POINTS} points"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> Float[np.ndarray, "2"]:
        return self._points[index]


class Folder(Source):
    """The PNG and JPEG files anywhere below a folder, by path; a bucket's, too.

    They become RGB or grey as `channels` (3 or 1) says, and are read when asked for.
    """

    white = 255.0

    def __init__(self, path: str, channels: int):
        if not path:
            raise UserError("config.data.name is 'folder:': give a path, as in 'folder:/path'")
        if channels not in _PILLOW_MODES:
            raise UserError(
                f"config.data.channels is {channels}: a folder's images are read as grey or "
                "RGB, set --config.data.channels to 1 or 3"
            )
        self.folder = folder = epath.Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"config.data.name is 'folder:{path}': there is no such folder")
        self._channels = channels
        self._files = sorted(
            parent / file
            for parent, _, files in folder.walk()
            for file in files
            if file.lower().endswith((".png", ".jpg", ".jpeg"))
        )
        if not self._files:
            raise UserError(
                f"config.data.name is 'folder:{path}': there is no .png, .jpg or .jpeg below it"
            )
        names = "\n".join(map(str, self._files))
        self.identity = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        return read_image(self._files[index], self._channels)


class Tfds(Source):
    """The images of one split of a TFDS data set that lies prepared as ArrayRecord.

    TFDS need not know the data set: what is found in `data_dir` is enough.
    """

    white = 255.0

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        import tensorflow_datasets as tfds  # only this source needs it

        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
        except Exception as error:  # of many classes, and many lines
            reason = str(error).strip().partition("\n")[0].removesuffix(".")
            known = tfds.list_builders(with_community_datasets=False)
            near = " or ".join(map(repr, difflib.get_close_matches(name.lower(), known)))
            raise UserError(
                f"config.data.name is {name!r}, which TFDS cannot open in "
                f"{data_dir or 'its default data_dir'}: {reason}; "
                + (f"did you mean {near}? " if near else "")
                + "other sources are 'digits', 'folder:/path' and, of points in the plane, "
                + ", ".join(map(repr, testbeds.PLANE))
            ) from error
        title = f"TFDS data set {name!r}"
        info = builder.info
        if not info.splits:
            raise UserError(
                f"{title} is not prepared in {builder.data_dir}: "
                f"run {_prepare_command(name, data_dir)}"
            )
        array_record = tfds.core.FileFormat.ARRAY_RECORD
        if array_record not in info.available_file_formats():
            raise UserError(
                f"{title} lies in {builder.data_dir} as {info.file_format.value}, which cannot "
                "be read at random: set --config.data.data_dir to another place and prepare it "
                f"there, {_prepare_command(name, 'ANOTHER_PLACE')}"
            )
        features = dict(info.features.items())
        image = features.get("image")
        if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
            raise UserError(
                f"{title} has no 8-bit image called 'image'; its features are "
                + ", ".join(f"{name}: {type(kind).__name__}" for name, kind in features.items())
            )
        _require_channels(title, image.shape[-1], channels)
        try:
            # TFDS would decode to other shapes than it declares (a grey JPEG among RGB
            # ones), and to other pixels where OpenCV is installed.
            self._examples = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=array_record
            )
        except ValueError as error:  # TFDS's own words are of many lines for some splits
            raise UserError(
                f"config.data.split is {split!r}, which names no images of {title}: "
                f"its splits are {', '.join(info.splits)}"
            ) from error
        self.identity = f"{info.full_name}[{split}]"
        self.folder = epath.Path(builder.data_dir)
        self._title = f"of {title}, split {split!r}"
        self._channels = channels

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        return self._decoded(index, lambda: self._examples[index]["image"])

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W C"]]:
        """Returns many at once, as TFDS reads them faster."""
        try:
            examples = self._examples.__getitems__(indices)
        except Exception:  # one by one, it is told which of them cannot be read
            return super().read(indices)
        pairs = zip(indices, examples, strict=True)
        return [self._decoded(index, functools.partial(e.get, "image")) for index, e in pairs]

    def _decoded(self, index: int, read: Callable[[], bytes]) -> UInt8[np.ndarray, "H W C"]:
        return _decode(f"{index} {self._title}", read, self._channels)


def _prepare_command(name: str, data_dir: str) -> str:
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where})'
        ".download_and_prepare(file_format='array_record')\""
    )


def _require_channels(title: str, found: int, wanted: int) -> None:
    if found not in _PILLOW_MODES:
        raise UserError(f"{title} has images of {found} channels: only 1 and 3 can be used")
    if found != wanted:
        raise UserError(
            f"{title} has images of {found} channel{'s' * (found > 1)}, config.data.channels "
            f"is {wanted}: set --config.data.channels={found}"
        )


def read_image(file: epath.PathLike, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Reads an image file as grey (1 channel) or RGB (3), whatever it holds.

    Raises:
      UserError: if it is not there, or no image.
    """
    path = epath.Path(file).expanduser()
    return _decode(str(path), path.read_bytes, channels)


def _decode(name: str, read: Callable[[], bytes], channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decodes an image file to grey or RGB, whatever it holds."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            if image.mode.startswith(("I", "F")):  # pillow would clip, not scale, to 8 bits
                raise ValueError("it has more than 8 bits a channel")
            pixels = np.asarray(image.convert(_PILLOW_MODES[channels]))
    except UnidentifiedImageError as error:  # its own words name a BytesIO
        raise UserError(f"cannot read image {name}: it is no image or damaged") from error
    except Exception as error:  # of many classes: the file's, the bucket's, pillow's
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read image {name}: {reason}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def open_source(config: ConfigDict) -> Source:
    """Opens what `config.data` names and reads the first example.

    Raises:
      UserError: where they are not there, not readable, not of config.data.channels, or not
        for the network.
    """
    data, network = config.data, config.energy.network
    if (data.name in testbeds.PLANE) != (network == "mlp"):
        kind, other = (
            ("points in the plane", "is for images: start from configs/toy2d.py")
            if network == "resnet"
            else ("no points", f"is for points: use {' or '.join(map(repr, testbeds.PLANE))}")
        )
        raise UserError(
            f"config.data.name is {data.name!r}, {kind}, and config.energy.network "
            f"{network!r} {other}"
        )
    source: Source
    if data.name in testbeds.PLANE:
        source = Points(data.name)
    elif data.name == "digits":
        source = Digits(data.channels)
    elif data.name.startswith("folder:"):
        source = Folder(data.name.removeprefix("folder:"), data.channels)
    else:
        source = Tfds(data.name, data.split, data.data_dir, data.channels)
    if data.dequantise and not math.isclose(data.dequantise * source.white, 2, rel_tol=1e-3):
        raise UserError(
            f"config.data.dequantise is {data.dequantise:g}, and a pixel's values in "
            f"{data.name!r} are {2 / source.white:g} apart: set it to that, or to 0"
        )
    source[0]  # so that an unreadable data set shows before a run has begun
    return source


def prepare(
    image: Num[np.ndarray, "H W C"], size: int, crop: str, white: float
) -> Float[np.ndarray, "size size C"]:
    """Crops, resizes and scales an image, in this order.

    The crop 'centre' is the largest centre square. Of CelebA's 218x178 it drops 20 rows at
    the top and 20 at the bottom, the preparation of Gao et al. (2021). The resize, left out
    where the size is right already, is bilinear and antialiased: where it shrinks, each new
    pixel is a mean of the old ones under a triangle as wide as two new pixels
    (`tf.image.resize` with `antialias=True`).

    Args:
      image: of any size, pixels in [0, white].
      size: of the result's sides.
      crop: 'centre' or 'none'.
      white: what becomes 1; 0 becomes -1.

    Returns:
      float32 in [-1, 1].
    """
    if crop == "centre":
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    image = image.astype(np.float32)
    if image.shape[:2] != (size, size):
        # One channel at a time: pillow has no float32 images of more.
        channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0)]
        bilinear = Image.Resampling.BILINEAR  # which pillow always antialiases
        resized = [np.asarray(c.resize((size, size), bilinear)) for c in channels]
        image = np.stack(resized, axis=-1)
    return image / (white / 2) - 1


def training_batches(
    config: ConfigDict, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, Float[np.ndarray, "B *D"]]]:
    """Returns this process's share of every step's batch, without end.

    The batch of a step is a function of config.seed and the step alone: not of where the
    run started, nor of the number of processes, whose shares lie one after the other in it.
    Every epoch goes through all examples in a new order; a batch may reach over its end.

    Args:
      config: of the run; uses seed, data and train.batch_size.
      start_step: the step, from 0, whose batch comes first.
      process_index: of this process.
      process_count: of all processes.

    Returns:
      An iterator of {'image': float32 in [-1, 1], or about as large where they are points},
      B = config.train.batch_size / process_count.

    Raises:
      UserError: at the call as `open_source` does; from the iterator where an image is
        unreadable.
    """
    size, rest = divmod(config.train.batch_size, process_count)
    if rest:
        raise UserError(
            f"config.train.batch_size is {config.train.batch_size}: "
            f"it must be a multiple of the {process_count} processes"
        )
    source, B = open_source(config), config.train.batch_size
    prepared, augmented = _preparation(config, source), _augmentation(config)
    own = slice(process_index * size, (process_index + 1) * size)

    def drawn(numbers: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return numbers[own], rng.integers(2**63, size=B)[own]

    def read(numbers_and_keys: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        numbers, keys = numbers_and_keys
        images = map(prepared, source.read(numbers.tolist()))
        return {
            "image": np.stack([augmented(*each) for each in zip(images, keys, strict=True)])
        }

    # Of numbers: what grain does with every example costs more than to decode a small one.
    numbers = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat(_EPOCHS)
    steps = numbers.batch(B).random_map(drawn)[start_step:]
    return iter(steps.map(read).to_iter_dataset(_READ_OPTIONS))


def all_images(
    config: ConfigDict, limit: int | None = None
) -> Iterator[Float[np.ndarray, "*D"]]:
    """Returns every example once, in the source's order, prepared as for training, unflipped.

    Few are held at a time, however many there are.

    Args:
      config: of the run; uses data.
      limit: how many at most; None for all.

    Raises:
      UserError: at the call as `open_source` does; from the iterator where an image is
        unreadable.
    """
    source = open_source(config)
    examples = grain.MapDataset.source(source).map(_preparation(config, source))
    return iter(examples[:limit].to_iter_dataset(_READ_OPTIONS))


def prepared_files(
    config: ConfigDict, files: Sequence[epath.PathLike]
) -> Float[np.ndarray, "n H W C"]:
    """Returns image files prepared as for training; uses config.data.

    Raises:
      UserError: naming a file that cannot be read.
    """
    data = config.data
    return np.stack(
        [
            prepare(read_image(file, data.channels), data.image_size, data.crop, white=255.0)
            for file in files
        ]
    )


def _preparation(
    config: ConfigDict, source: Source
) -> Callable[[Num[np.ndarray, "*D"]], Float[np.ndarray, "*D"]]:
    """Returns what makes a source's examples float32; of images, in [-1, 1]."""
    if not source.white:
        return lambda point: point  # they are ready as they are
    # Read once, here: a ConfigDict may change while the threads are at work.
    size, crop, white = config.data.image_size, config.data.crop, source.white
    return lambda image: prepare(image, size, crop, white)


def _augmentation(
    config: ConfigDict,
) -> Callable[[Float[np.ndarray, "*D"], int], Float[np.ndarray, "*D"]]:
    """Returns (example, key) -> example, flipped and dequantised as `config.data` says."""
    flip, width = config.data.flip, config.data.dequantise

    def augmented(image: Float[np.ndarray, "*D"], key: int) -> Float[np.ndarray, "*D"]:
        rng = np.random.Generator(np.random.Philox(key=key))
        image = _flip(image, rng) if flip else image
        return _dequantise(image, rng, width) if width else image

    return augmented if flip or width else lambda image, key: image


def _flip(image: Float[np.ndarray, "H W C"], rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1] if rng.random() < 0.5 else image


def _dequantise(
    image: Float[np.ndarray, "H W C"], rng: np.random.Generator, width: float
) -> np.ndarray:
    return image + np.float32(width) * (rng.random(image.shape, np.float32) - np.float32(0.5))
