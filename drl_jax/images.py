"""Pictures: arrays in [-1, 1], or points, and what PNG files are made of them."""

import io

import numpy as np
from etils import epath
from jaxtyping import ArrayLike, Float, UInt8
from PIL import Image

from drl_jax.errors import UserError
from drl_jax.files import write_whole

GAP = 1  # pixels between tiles, before enlargement
GREY = 128
ROUNDING = 1e-5  # by which a resize may leave [-1, 1]
REACH = 1.5  # half a histogram's side, in units of the data
BINS = 96  # of a histogram along a side
POINTS = 2000  # that make one


def to_uint8(x: Float[np.ndarray, "*D"]) -> UInt8[np.ndarray, "*D"]:
    """Maps [-1, 1] to 0..255, clipping what lies outside."""
    return np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def as_images(x: ArrayLike, shape: tuple[int, ...]) -> Float[np.ndarray, "n H W C"]:
    """Returns x in float32, if it is at least one image of this shape [H, W, C] in [-1, 1].

    Raises:
      UserError: with the dtype, the shape or the range that is wrong.
    """
    x = np.asarray(x)
    if x.dtype.kind in "biu":  # whatever their range, they are not scaled to [-1, 1]
        raise UserError(
            f"the images are of dtype {x.dtype}: give floating-point numbers in [-1, 1]"
        )
    x = x.astype(np.float32)
    if x.ndim != 4 or x.shape[1:] != shape or not len(x):
        given, wanted = ("x".join(map(str, shape)) for shape in (x.shape, shape))
        raise UserError(f"the images are an array of {given}: give one or more of {wanted}")
    if not np.abs(x).max() <= 1 + ROUNDING:  # also where one is not a number
        raise UserError(
            f"the images' pixels lie in [{x.min():g}, {x.max():g}]: scale or clip them to "
            "[-1, 1]"
        )
    return x


def grid(x: Float[np.ndarray, "B H W C"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Lays images out in rows with grey gaps; small ones are enlarged to be looked at.

    The enlargement repeats pixels, by the largest whole factor that keeps a tile of at
    most 64 pixels.
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
    """Counts points of the plane in [-REACH, REACH]², the more the whiter; y goes up.

    Square roots of the counts are shown, whose noise is the same in dark and bright places.
    """
    edges = np.linspace(-REACH, REACH, BINS + 1)
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))
    roots = np.sqrt(counts.T[::-1])
    bright = to_uint8(2 * roots / max(roots.max(), 1) - 1)[..., None]
    factor = 512 // BINS
    return bright.repeat(factor, axis=0).repeat(factor, axis=1)


def are_points(shape: tuple[int, ...]) -> bool:
    """Whether examples of this shape are points, not images [H, W, C]."""
    return len(shape) == 1


def shown(shape: tuple[int, ...], columns: int) -> int:
    """Returns how many samples of this shape `picture` makes one of."""
    return POINTS if are_points(shape) else columns**2


def picture(x: Float[np.ndarray, "B *D"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Shows samples: images in a grid, as many rows as columns at most, or points."""
    if are_points(x.shape[1:]):
        return histogram(x)
    return grid(x[: shown(x.shape[1:], columns)], columns)


def write_png(path: epath.Path, image: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes one grey (C = 1) or colour (C = 3) image."""
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
    write_whole(path, encoded.getvalue())
