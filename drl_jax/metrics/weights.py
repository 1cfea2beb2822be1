"""Loads the weights of the Inception network from a PyTorch file given by the user."""

import functools
import hashlib
import re
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Num

from drl_jax.errors import UserError
from drl_jax.metrics import inception
from drl_jax.storage import torch_file

FIELD = "config.evaluation.inception_weights"
DOWNLOAD_HINT = (
    "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    f"pt_inception-2015-12-05-6726825d.pth and set --{FIELD} to its path"
)
SUFFIXES = (".pth", ".pt")

# Last part of a variable's name in Flax -> last part of the tensor's name in the file.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Number of axes -> order of the axes that turns a tensor of the file into a Flax variable.
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


class Weights(NamedTuple):
    """Weights of the Inception network.

    Attributes:
      variables: Flax variables of `inception.Network`, in float32.
      sha256: SHA-256 of the file, in hexadecimal digits.
    """

    variables: dict[str, Any]
    sha256: str


def load(path: str) -> Weights:
    """Reads the weights from a file written by `torch.save` (.pth or .pt).

    If the file name ends in a dash and eight hexadecimal digits, as in PyTorch's hub, these
    must be the first digits of the file's SHA-256.

    Raises:
      UserError: if the file is missing, damaged, of another format, or contains the weights of
        another network.
    """
    file = epath.Path(path).expanduser()
    title = f"{FIELD} is {path!r}"
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"{title}: not a PyTorch file; its name must end in {' or '.join(SUFFIXES)}"
        )
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{title}: there is no such file; {DOWNLOAD_HINT}") from error
    except OSError as error:
        raise UserError(f"{title}: cannot read it ({error.strerror})") from error
    sha256 = hashlib.sha256(data).hexdigest()
    expected = re.search(r"-([0-9a-f]{8})$", file.stem)
    if expected and expected[1] != sha256[:8]:
        raise UserError(
            f"{title}: its SHA-256 starts with {sha256[:8]}, not {expected[1]}, so it is "
            "damaged; download it again"
        )
    try:
        tensors = torch_file.read(data)
    except Exception as error:  # pickle and zipfile raise many classes
        reason = " ".join(str(error).split())
        raise UserError(f"{title}: cannot read it ({reason})") from error
    return Weights(to_variables(tensors, title), sha256)


def to_variables(tensors: dict[str, Num[np.ndarray, "..."]], title: str) -> dict[str, Any]:
    """Converts tensors with PyTorch's names to the variables of `inception.Network`.

    Args:
      tensors: tensors of the file, by name.
      title: start of the error message.

    Raises:
      UserError: naming the first three tensors that are missing, unknown, of the wrong shape,
        or not finite floating-point numbers, and counting the others.
    """
    layout = file_layout()
    problems = [f"{name} is missing" for name in layout if name not in tensors]
    arrays = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):  # only needed to train the network
            continue
        if name not in layout:
            problems.append(f"{name} is unknown")
            continue
        path, shape = layout[name]
        if tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, not {shape}")
        elif tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
            problems.append(f"{name} does not contain finite floating-point numbers")
        else:
            arrays[path] = np.float32(tensor.transpose(AXES[tensor.ndim]))
    if problems:
        more = f" and {len(problems) - 3} more" * (len(problems) > 3)
        raise UserError(
            f"{title}: these are not the weights of Inception-2015: "
            f"{', '.join(problems[:3])}{more}; {DOWNLOAD_HINT}"
        )
    return traverse_util.unflatten_dict(arrays)


@functools.cache
def file_layout() -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Returns, by the name of each tensor in the file, its path in Flax and its shape."""
    layout = {}
    for path, leaf in traverse_util.flatten_dict(inception.abstract_variables()).items():
        _, *modules, last = path
        shape = tuple(leaf.shape[axis] for axis in np.argsort(AXES[leaf.ndim]))
        layout[".".join((*modules, LEAVES[last]))] = path, shape
    return layout
