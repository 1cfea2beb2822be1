"""The Inception network's weights, from the file that the user names."""

import functools
import hashlib
import io
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jaxtyping import Num

from drl_jax.errors import UserError
from drl_jax.evaluation import inception, torch_file

FIELD = "config.evaluation.inception_weights"
GET = (
    "get https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    f"pt_inception-2015-12-05-6726825d.pth and give its path as --{FIELD}"
)

# A variable's last name in Flax, and in the file.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# The axes of Flax's kernels among those of the file's, by how many there are.
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
      variables: of `inception.Network`.
      sha256: of the file.
    """

    variables: dict[str, Any]
    sha256: str


def load(path: str) -> Weights:
    """Reads a .pth (or .pt), .npz or .safetensors file of the weights.

    Where the file's name ends in a dash and eight hexadecimal digits, these must begin its
    SHA-256, as PyTorch's hub has it.

    Raises:
      UserError: if the file is not there, damaged, of another kind, or not of this network.
    """
    file = epath.Path(path).expanduser()
    title = f"{FIELD} is {path!r}"
    if file.suffix not in READERS:
        *others, last = READERS
        raise UserError(f"{title}: it must end in {', '.join(others)} or {last}")
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{title}: there is no such file; {GET}") from error
    except OSError as error:
        raise UserError(f"{title}: it cannot be read ({error.strerror})") from error
    sha256 = hashlib.sha256(data).hexdigest()
    named = re.search(r"-([0-9a-f]{8})$", file.stem)
    if named and named[1] != sha256[:8]:
        raise UserError(
            f"{title}: its SHA-256 begins with {sha256[:8]}, not {named[1]}; it is damaged, "
            "get it again"
        )
    try:
        tensors = READERS[file.suffix](data)
    except Exception as error:  # of many classes: pickle's, zipfile's, the libraries'
        reason = " ".join(str(error).split())
        raise UserError(f"{title}: it cannot be read ({reason})") from error
    return Weights(variables(title, tensors), sha256)


def variables(title: str, tensors: dict[str, Num[np.ndarray, "..."]]) -> dict[str, Any]:
    """Returns tensors under PyTorch's names as the variables of `inception.Network`.

    Raises:
      UserError: opening with `title` and naming the first three tensors that are missing,
        unknown, or no finite floats of the right shape, and how many there are.
    """
    places = file_places()
    problems = [f"{name} is missing" for name in places if name not in tensors]
    arrays = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):  # of training; the network has no use for it
            continue
        if name not in places:
            problems.append(f"{name} is unknown")
            continue
        path, shape = places[name]
        if tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, not {shape}")
        elif tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
            problems.append(f"{name} is not of finite floats")
        else:
            arrays[path] = np.float32(tensor.transpose(AXES[tensor.ndim]))
    if problems:
        more = f" and {len(problems) - 3} more" * (len(problems) > 3)
        raise UserError(
            f"{title}: it does not hold the weights of Inception-2015: "
            f"{', '.join(problems[:3])}{more}"
        )
    return traverse_util.unflatten_dict(arrays)


@functools.cache
def file_places() -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Returns, by its name in the file, a variable's path and its tensor's shape there."""
    places = {}
    for path, leaf in traverse_util.flatten_dict(inception.abstract_variables()).items():
        _, *modules, last = path
        shape = tuple(leaf.shape[axis] for axis in np.argsort(AXES[leaf.ndim]))
        places[".".join((*modules, LEAVES[last]))] = path, shape
    return places


def _read_npz(data: bytes) -> dict[str, Num[np.ndarray, "..."]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


READERS = {
    ".pth": torch_file.read,
    ".pt": torch_file.read,
    ".npz": _read_npz,
    ".safetensors": safetensors.numpy.load,
}
