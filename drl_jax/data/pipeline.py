"""The data pipeline: how examples are prepared, augmented, shuffled and batched.

Most functions take an open `sources.Source`. Batches are read ahead in threads; if one raises a
`UserError` (because a disk fails, for example), the iterator of the batches raises it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from etils import epath
from jaxtyping import Float, Int, Num, UInt8
from ml_collections import ConfigDict
from PIL import Image

from drl_jax.data import sources
from drl_jax.data.image_files import read_image
from drl_jax.data.sources import Source
from drl_jax.errors import UserError

# Each thread makes whole batches. At exit, a process waits for all batches that are begun or
# buffered, so the buffer is only large enough that a training step does not wait for data.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# Practically endless. `repeat()` without a number makes the length of grain's data set overflow
# for batches of one.
_EPOCHS = 2**31


def prepare(
    image: Num[np.ndarray, "H W C"], size: int, crop: str, white: float
) -> Float[np.ndarray, "size size C"]:
    """Crops, resizes and scales an image, in this order.

    The crop 'centre' is the largest centre square. Of CelebA's 218x178 images it drops 20
    rows at the top and 20 at the bottom, as Gao et al. (2021) do. The resize is bilinear and
    antialiased: when it shrinks an image, each new pixel is a weighted mean of old ones, with
    triangular weights two new pixels wide (`tf.image.resize` with `antialias=True`). Images
    that already have the right size are not resized.

    Args:
      image: pixels in [0, white].
      size: height and width of the result, in pixels.
      crop: 'centre' or 'none'.
      white: the pixel value that is mapped to 1; 0 is mapped to -1.

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
        # One channel at a time, since pillow has no float32 images with several channels.
        channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0)]
        bilinear = Image.Resampling.BILINEAR  # pillow antialiases it
        resized = [np.asarray(c.resize((size, size), bilinear)) for c in channels]
        image = np.stack(resized, axis=-1)
    return image / (white / 2) - 1


def to_uint8(x: Float[np.ndarray, "*D"], truncate: bool = False) -> UInt8[np.ndarray, "*D"]:
    """Maps [-1, 1] to pixel values 0..255: clips, then rounds to the nearest integer.

    Ties are rounded to the even integer: 0, halfway between 127 and 128, becomes 128. On
    8-bit images that were not resized this is the exact inverse of `prepare`.

    Args:
      x: images; values beyond [-1, 1] are clipped.
      truncate: rounds down instead, which makes images half a pixel value darker on average.
    """
    pixels = (np.clip(x, -1, 1) + 1) * 127.5
    return (np.floor(pixels) if truncate else np.round(pixels)).astype(np.uint8)


def training_batches(
    config: ConfigDict,
    source: Source,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an endless iterator over this process's share of each step's batch.

    The batch of a step depends only on config.seed and the step, not on where the run started
    or on the number of processes; the shares of the processes, concatenated in order, are the
    batch. Each epoch visits every example once, in a new order. A batch can span the end of
    an epoch. In place of an example that is to be skipped, a random other one is read, which
    also depends only on config.seed and the step.

    Args:
      config: uses seed, data and train.batch_size.
      source: the training examples.
      start_step: index of the first step, from 0.
      process_index: index of this process.
      process_count: number of processes.

    Returns:
      An iterator of {'image': x}, x [B, ...] float32, with
      B = config.train.batch_size / process_count. Images are in [-1, 1], plus dequantisation
      noise if configured. If config.data.classes is not 0, there is also 'label', [B] int32:
      the class of each example, in 1..classes.

    Raises:
      UserError: immediately if the batch size is not divisible by process_count; from the
        iterator if an image is unreadable.
    """
    share, remainder = divmod(config.train.batch_size, process_count)
    if remainder:
        raise UserError(
            f"config.train.batch_size is {config.train.batch_size}, which is not divisible by "
            f"the {process_count} processes; set it to a multiple of {process_count}"
        )
    batch_size = config.train.batch_size
    prepare_example, augment = _preparation(config, source), _augmentation(config)
    labelled = config.data.classes > 0
    read_examples = source.read_labelled if labelled else source.read
    own = slice(process_index * share, (process_index + 1) * share)

    def select_share(
        indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        return indices[own], rng.integers(2**63, size=batch_size)[own]

    def read(indices_and_keys: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        indices, keys = indices_and_keys
        pairs = list(zip(read_examples(indices.tolist()), keys.tolist(), strict=True))
        readable = [
            sources.random_example(source, key, read_examples) if example is None else example
            for example, key in pairs
        ]
        images, labels = zip(*readable, strict=True) if labelled else (readable, None)
        batch = {
            "image": np.stack(
                [
                    augment(prepare_example(x), key)
                    for x, (_, key) in zip(images, pairs, strict=True)
                ]
            )
        }
        return batch | {"label": 1 + np.array(labels, np.int32)} if labelled else batch

    # grain handles indices, not examples: its overhead per element costs more than decoding
    # a small image.
    indices = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat(_EPOCHS)
    steps = indices.batch(batch_size).random_map(select_share)[start_step:]
    return iter(steps.map(read).to_iter_dataset(_READ_OPTIONS))


def all_examples(
    config: ConfigDict, source: Source, limit: int | None = None
) -> Iterator[Float[np.ndarray, "*D"]]:
    """Returns an iterator over the examples in the source's order, prepared but not augmented.

    Examples that are to be skipped (`Source.read`) are left out. Only a few examples are in
    memory at a time.

    Args:
      config: uses data.
      source: the examples.
      limit: maximum number of examples; None for all.

    Raises:
      UserError: from the iterator if an image is unreadable.
    """
    prepare_example = _preparation(config, source)

    def read(index: int) -> Float[np.ndarray, "*D"] | None:
        (example,) = source.read([index])
        return None if example is None else prepare_example(example)

    examples = grain.MapDataset.range(len(source)).map(read)  # grain leaves out None
    return itertools.islice(examples.to_iter_dataset(_READ_OPTIONS), limit)


def batches_in_order(
    config: ConfigDict, source: Source, size: int = 1024
) -> Iterator[Float[np.ndarray, "n *D"]]:
    """Yields the examples of `all_examples` in batches of `size`; the last can be smaller."""
    examples = all_examples(config, source)
    while batch := list(itertools.islice(examples, size)):
        yield np.stack(batch)


def load_examples(
    config: ConfigDict, source: Source, limit: int | None = None, least: int = 1
) -> Float[np.ndarray, "n *D"]:
    """Loads the examples of `all_examples` into memory.

    Args:
      config: uses data.
      source: the examples.
      limit: maximum number of examples; None for all.
      least: number of examples that are needed.

    Raises:
      UserError: if fewer than `least` examples can be read.
    """
    examples = list(all_examples(config, source, limit))
    if len(examples) < least:
        raise UserError(
            f"{config.data.name!r} has {len(examples)} readable examples, but {least:g} or "
            "more are needed"
        )
    return np.stack(examples)


def load_labelled(
    config: ConfigDict, source: Source, limit: int
) -> tuple[Float[np.ndarray, "n *D"], Int[np.ndarray, "n"]]:
    """Loads the first `limit` examples with their labels, from 1.

    Those that cannot be read, and those without a label (-1 in TFDS), are left out.

    Args:
      config: uses data.
      source: examples with labels.
      limit: number of examples to read.

    Raises:
      UserError: if there are none.
    """
    prepare_example = _preparation(config, source)
    read = source.read_labelled(range(min(limit, len(source))))
    found = [example for example in read if example is not None and example[1] >= 0]
    if not found:
        raise UserError(f"{config.data.name!r} has no readable examples with labels")
    x = np.stack([prepare_example(image) for image, _ in found])
    return x, 1 + np.array([label for _, label in found])


def prepared_files(
    config: ConfigDict, files: Sequence[epath.PathLike]
) -> Float[np.ndarray, "n H W C"]:
    """Reads image files and prepares them as for training; uses config.data.

    Raises:
      UserError: naming a file that cannot be read.
    """
    data = config.data
    return np.stack(
        [
            prepare(
                image=read_image(file, data.channels, data.background),
                size=data.image_size,
                crop=data.crop,
                white=255.0,
            )
            for file in files
        ]
    )


def _preparation(
    config: ConfigDict, source: Source
) -> Callable[[Num[np.ndarray, "*D"]], Float[np.ndarray, "*D"]]:
    """Returns the function that prepares one example: `prepare`, or the identity for points."""
    # The fields are read here, since the config may change while threads call the function.
    size, crop, white = config.data.image_size, config.data.crop, source.white
    if white is None:
        return lambda point: point
    return lambda image: prepare(image, size, crop, white)


def _augmentation(
    config: ConfigDict,
) -> Callable[[Float[np.ndarray, "*D"], int], Float[np.ndarray, "*D"]]:
    """Returns a function (example, random key) -> example that flips and dequantises."""
    flip, width = config.data.flip, config.data.dequantise

    def augment(image: Float[np.ndarray, "*D"], key: int) -> Float[np.ndarray, "*D"]:
        rng = np.random.Generator(np.random.Philox(key=key))
        image = _flip(image, rng) if flip else image
        return _dequantise(image, rng, width) if width else image

    return augment if flip or width else lambda image, key: image


def _flip(image: Float[np.ndarray, "H W C"], rng: np.random.Generator) -> np.ndarray:
    """Mirrors an image horizontally with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def _dequantise(
    image: Float[np.ndarray, "H W C"], rng: np.random.Generator, width: float
) -> np.ndarray:
    """Adds uniform noise in [-width / 2, width / 2)."""
    return image + np.float32(width) * (rng.random(image.shape, np.float32) - np.float32(0.5))
