"""Draws samples as PNG files: images as a grid, points as a histogram, others as figures."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from drl_jax.data.pipeline import to_uint8
from drl_jax.plots import arrays
from drl_jax.standardisation import IDENTITY, Standardisation
from drl_jax.storage.atomic import write_atomically

GAP = 1  # width of the gap between images, before they are enlarged [pixels]
GREY = 128  # pixel value of the gap
HALF_WIDTH = 1.5  # half the side of a histogram, in units of the data
BINS = 96  # along each side of a histogram
POINTS = 2000  # samples per histogram


def are_images(shape: tuple[int, ...]) -> bool:
    """Returns whether examples are images [H, W, C]."""
    return len(shape) == 3


def grid(x: Float[np.ndarray, "B H W C"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Arranges images in rows, separated by grey gaps.

    Images are enlarged by repeating pixels, by the largest integer factor with which they are
    at most 64 pixels wide and high. Larger images keep their size.

    Args:
      x: images in [-1, 1].
      columns: number of images per row. The last row may have fewer.
    """
    B, H, W, C = x.shape
    rows = -(-B // columns)
    tiles = np.full((rows * columns, H + GAP, W + GAP, C), GREY, np.uint8)
    tiles[:B, :H, :W] = to_uint8(x)
    sheet = tiles.reshape(rows, columns, H + GAP, W + GAP, C).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (H + GAP), columns * (W + GAP), C)
    sheet = np.pad(sheet, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=GREY)
    factor = max(1, 64 // max(H, W))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def histogram(x: Float[np.ndarray, "B 2"]) -> UInt8[np.ndarray, "h w 1"]:
    """Returns a histogram of points in [-HALF_WIDTH, HALF_WIDTH]² as an image, y upwards.

    The brightness is proportional to the square root of the count, whose standard deviation is
    about the same everywhere (1/2).
    """
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, BINS + 1)
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))
    roots = np.sqrt(counts.T[::-1])
    bright = to_uint8(2 * roots / max(roots.max(), 1) - 1)[..., None]
    factor = 512 // BINS
    return bright.repeat(factor, axis=0).repeat(factor, axis=1)


def grid_size(shape: tuple[int, ...], columns: int) -> int:
    """Returns the number of samples of this shape that `picture` shows."""
    return POINTS if len(shape) == 1 else columns**2


def picture(
    x: Float[np.ndarray, "B *D"],
    columns: int,
    data: Float[np.ndarray, "m *D"] | None = None,
    names: Sequence[str] = (),
) -> UInt8[np.ndarray, "h w C"]:
    """Returns a picture of samples.

    Images become a grid with at most as many rows as columns, and points in the plane a
    histogram (`histogram`). Other vectors become a corner plot (`arrays.corner`), also those of
    two values with `data`, and signals are overlaid (`arrays.signals`). Of volumes, the middle
    slices along the first axis are shown, from their 1st percentile (black) to their 99th.

    Args:
      x: examples, images in [-1, 1]; of images, only the first `grid_size` are shown.
      columns: number of images per row.
      data: vectors or signals to show beside the samples, if any; not for images.
      names: names of the features of vectors; empty if there are none.
    """
    if x.ndim == 5:
        x = slices(x[: columns**2])
    if x.ndim == 4:
        return grid(x[: grid_size(x.shape[1:], columns)], columns)
    if x.ndim == 3:
        return arrays.signals(x, data)
    if data is None and x.shape[1] == 2:
        return histogram(x)
    return arrays.corner(x, data, names)


def slices(x: Float[np.ndarray, "B D H W C"]) -> Float[np.ndarray, "B H W 1"]:
    """Returns the middle slices of volumes along the first axis, as images in [-1, 1].

    Of several channels the first is shown. Black is the 1st percentile of the values, white the
    99th.
    """
    x = x[:, x.shape[1] // 2, ..., :1]
    low, high = np.nanpercentile(x, [1, 99])
    return np.clip(2 * (x - low) / max(high - low, 1e-9) - 1, -1, 1)


def rows(
    parts: Mapping[str, Float[np.ndarray, "n _ *D"]],
    titles: Sequence[str] = (),
    standardisation: Standardisation = IDENTITY,
) -> UInt8[np.ndarray, "h w C"]:
    """Returns a picture that compares several versions of each of n examples.

    Images, and slices of volumes, are tiles, with one row per example. Vectors and signals are
    lines, with one panel per example (`arrays.panels`).

    Args:
      parts: versions of each kind, in the order of the tiles; the names are those of
        `arrays.STYLES`.
      titles: of the panels, if any.
      standardisation: of the data; vectors are shown standardised.
    """
    first = next(iter(parts.values()))
    if first.ndim < 5:
        return arrays.panels(parts, titles, standardisation)
    tiles = np.concatenate(list(parts.values()), axis=1)
    columns, flat = tiles.shape[1], tiles.reshape(-1, *tiles.shape[2:])
    return grid(flat if flat.ndim == 4 else np.nan_to_num(slices(flat)), columns)


def write_png(path: epath.Path, image: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes a grey (C = 1) or RGB (C = 3) image.

    Raises:
      UserError: if the file cannot be written.
    """
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
    write_atomically(path, encoded.getvalue())
