"""Checkpoints of the authors' PyTorch program for CDRL (Zhu et al. 2024).

`torch.save` writes a dictionary with these entries:

- `pi_state_dict`, `p_state_dict`: the raw weights of the energy and of the initialiser. Their
  names start with `module.`. A spectrally normalised layer has `weight_orig` [out, ...] and the
  vectors of its power iteration, `weight_u` [out] and `weight_v`.
- `pi_ema_state_dict`, `p_ema_state_dict`: the exponential moving average of the weights, as the
  list `shadow_params`. It has no names; its order is that of the raw weights, without the
  vectors of the power iterations.

The states of the optimisers are not read.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Num

from drl_jax.errors import UserError
from drl_jax.networks import resnet, unet
from drl_jax.networks.energy import Energy, Params, Vectors
from drl_jax.storage import torch_file

Tensors = dict[str, Num[np.ndarray, "..."]]  # by the program's name, without 'module.'

ENERGY, INITIALISER = "pi", "p"  # the program's names for the networks
BUFFERS = ("weight_u", "weight_v")
ATTENTION = (16, 8)  # sizes of images that the program's U-Net uses attention at
GROUPS = 32  # of its normalisations

# Name of a layer in our network -> name in the program's.
ENERGY_LAYERS = {
    "temb_0": "temb_map1",
    "temb_1": "temb_map2",
    "y_map": "y_map",
    "conv_in": "module_list.0",
    "head": "temb_final",
}
INITIALISER_LAYERS = {
    "temb_0": "time_mlp.1",
    "temb_1": "time_mlp.3",
    "y_map": "y_mlp.0",
    "conv_in": "init_conv",
    "middle_0": "mid_block1",
    "middle_attention": "mid_attn",
    "middle_1": "mid_block2",
    "norm_out": "norm",
    "conv_out": "final_conv",
}
# Likewise for the layers inside a block.
ENERGY_INNER = {"dense": "temb_map", "skip": "short_cut"}
INITIALISER_INNER = {"dense": "mlp.1", "skip": "res_conv", "qkv": "to_qkv", "out": "to_out"}


class Weights(NamedTuple):
    """Weights of one network in a checkpoint.

    Attributes:
      raw: raw weights and, where a layer is spectrally normalised, its vectors.
      ema: exponential moving average of the weights; no vectors.
    """

    raw: Tensors
    ema: Tensors


class Checkpoint(NamedTuple):
    """Weights of both networks in a checkpoint."""

    energy: Weights
    initialiser: Weights


class EnergyArchitecture(NamedTuple):
    """Arguments of `resnet.cdrl_energy` that the weights determine; see there."""

    channels: int
    ch: int
    mult: tuple[int, ...]
    N: int
    classes: int


class InitialiserArchitecture(NamedTuple):
    """Arguments of `unet.network` that the weights and the image size determine; see there."""

    ch: int
    mult: tuple[int, ...]
    N: int
    attention: tuple[int, ...]
    classes: int
    groups: int = GROUPS


class Parts(NamedTuple):
    """Both networks of a checkpoint and their parameters.

    The effective kernel of a spectrally normalised layer of the program is weight_orig / (u · W
    v), with W = weight_orig as a matrix [out, -1]. `Energy.normalise` makes one more power
    iteration from u, on raw and averaged parameters alike. The results are equal as far as the
    power iterations have converged.

    Attributes:
      energy: architecture of the energy f.
      initialiser: architecture of the U-Net U; the initialiser is x + U(x, level).
      params: raw parameters of f.
      ema: exponential moving average of the raw parameters.
      vectors: vectors of f's power iterations.
      initialiser_params: raw parameters of U.
      initialiser_ema: exponential moving average of the raw parameters.
    """

    energy: EnergyArchitecture
    initialiser: InitialiserArchitecture
    params: Params
    ema: Params
    vectors: Vectors
    initialiser_params: Params
    initialiser_ema: Params


def read(path: str) -> Checkpoint:
    """Reads the weights of both networks.

    Args:
      path: a file that the authors' program wrote, such as 'best.pth.tar'.

    Raises:
      UserError: if there is no such file, or it is damaged, has another format, or lacks one of
        the four entries with weights.
    """
    entries = [
        f"{network}{kind}_state_dict"
        for network in (ENERGY, INITIALISER)
        for kind in ("", "_ema")
    ]
    try:
        found = torch_file.read_nested(epath.Path(path).expanduser().read_bytes(), entries)
    except Exception as error:  # pickle and zipfile raise many classes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path} cannot be read as a checkpoint of the authors' CDRL program "
            f"({' '.join(str(reason).split())}): give a file such as best.pth.tar"
        ) from error
    if missing := [name for name in entries if name not in found]:
        raise UserError(
            f"{path} is not a checkpoint of the authors' CDRL program: it lacks "
            f"{', '.join(missing)}; give a file such as best.pth.tar"
        )
    return Checkpoint(*(_weights(found, network) for network in (ENERGY, INITIALISER)))


def _weights(entries: Mapping[str, Any], network: str) -> Weights:
    """Returns the weights of one network, after checking that they are named tensors.

    Raises:
      UserError: if they are not, or the average has another number of tensors.
    """
    raw = entries[f"{network}_state_dict"]
    average: Any = entries[f"{network}_ema_state_dict"]
    if isinstance(average, dict):
        average = average.get("shadow_params")
    for entry, kind, tensors in (
        (f"{network}_state_dict", dict, raw),
        (f"{network}_ema_state_dict", list, average),
    ):
        values = tensors.values() if isinstance(tensors, dict) else tensors
        if not isinstance(tensors, kind) or not all(isinstance(v, np.ndarray) for v in values):
            raise UserError(
                f"the CDRL checkpoint's {entry} does not consist of tensors: give a checkpoint "
                "that the authors' CDRL program wrote"
            )
    raw = {str(name).removeprefix("module."): tensor for name, tensor in raw.items()}
    names = [name for name in raw if not name.endswith(BUFFERS)]
    if len(average) != len(names):
        raise UserError(
            f"the CDRL checkpoint's {network}_ema_state_dict has {len(average)} tensors, but "
            f"{network}_state_dict has {len(names)} parameters: give a complete checkpoint"
        )
    return Weights(raw, dict(zip(names, average, strict=True)))


def extract(checkpoint: Checkpoint, image_size: int) -> Parts:
    """Returns both architectures and all parameters.

    Args:
      checkpoint: weights by the program's names.
      image_size: height and width of the images [pixels], which the checkpoint does not record.

    Raises:
      UserError: if the image size does not fit the networks, or a tensor of a network is
        missing, unexpected or of the wrong shape; the message names it.
    """
    energy_architecture = infer_energy(checkpoint.energy.raw)
    energy = resnet.cdrl_energy(
        image_size, levels=jnp.zeros(1), **energy_architecture._asdict()
    )
    initialiser_architecture = infer_initialiser(checkpoint.initialiser.raw, image_size)
    network = unet.network(image_size, **initialiser_architecture._asdict())
    return Parts(
        energy_architecture,
        initialiser_architecture,
        *_energy_parameters(checkpoint.energy, energy_architecture, energy),
        *_initialiser_parameters(
            checkpoint.initialiser, initialiser_architecture, network, energy.shape
        ),
    )


def infer_energy(tensors: Tensors) -> EnergyArchitecture:
    """Returns the architecture of the energy.

    The program's list of modules holds the first convolution, then N blocks per resolution,
    with a mean pooling, which has no weights, between two resolutions.

    Raises:
      UserError: if there is no such network.
    """
    first = tensors.get("module_list.0.weight_orig")
    pattern = re.compile(r"module_list\.(\d+)\.conv1\.weight_orig")
    widths = _widths(tensors, pattern)
    if first is None or first.ndim != 4 or not widths:
        raise _no_network(ENERGY, "module_list.0.weight_orig")
    positions = sorted(widths)
    starts = [i for i in positions if i - 1 not in widths]  # of each resolution
    lengths = [
        next(n for n in range(1, len(positions) + 1) if i + n not in widths) for i in starts
    ]
    ch, channels = first.shape[:2]
    mult = tuple(max(widths[i] // ch, 1) for i in starts)
    return EnergyArchitecture(
        channels, ch, mult, max(lengths), _classes(tensors, "y_map.weight_orig")
    )


def infer_initialiser(tensors: Tensors, image_size: int) -> InitialiserArchitecture:
    """Returns the architecture of the initialiser.

    Args:
      tensors: raw weights by the program's names.
      image_size: height and width of the images [pixels].

    Raises:
      UserError: if there is no such network, the images cannot be halved often enough, or the
        sizes with attention are not those of the program.
    """
    first = tensors.get("init_conv.weight")
    widths = _widths(tensors, re.compile(r"downs\.(\d+)\.0\.conv1\.weight"))
    if first is None or first.ndim != 4 or not widths:
        raise _no_network(INITIALISER, "init_conv.weight")
    ch = first.shape[0]
    mult = tuple(max(widths.get(i, ch) // ch, 1) for i in range(1 + max(widths)))
    resnet.require_divisible(image_size, mult)
    sizes = [image_size >> resolution for resolution in range(len(mult))]
    attention = tuple(
        size
        for i, size in enumerate(sizes)
        if any(name.startswith((f"downs.{i}.1.norm.", f"downs.{i}.1.to_")) for name in tensors)
    )
    if attention != tuple(size for size in sizes if size in ATTENTION):
        raise UserError(
            f"images of {image_size}x{image_size} would have attention at the sizes "
            f"{list(attention)} of {sizes}, but the authors' CDRL program has it at "
            f"{list(ATTENTION)}: give the size of the images that it was trained on"
        )
    last = re.compile(rf"downs\.{len(mult) - 1}\.(\d+)\.conv1\.weight")
    N = len(_widths(tensors, last))
    return InitialiserArchitecture(ch, mult, N, attention, _classes(tensors, "y_mlp.0.weight"))


def _widths(tensors: Tensors, pattern: re.Pattern[str]) -> dict[int, int]:
    """Returns the number of output channels of each kernel whose name matches a pattern.

    The key is the integer in the pattern's group.
    """
    return {
        int(match[1]): tensor.shape[0]
        for name, tensor in tensors.items()
        if (match := pattern.fullmatch(name)) and tensor.ndim == 4
    }


def _classes(tensors: Tensors, name: str) -> int:
    """Returns the number of classes, from the kernel [out, classes + 1] of the labels."""
    return tensors[name].shape[1] - 1 if name in tensors and tensors[name].ndim == 2 else 0


def _no_network(network: str, first: str) -> UserError:
    return UserError(
        f"the CDRL checkpoint's {network}_state_dict has no module.{first} and blocks: give a "
        "checkpoint that the authors' CDRL program wrote"
    )


def energy_name(path: str, N: int) -> str:
    """Returns the program's name of a parameter of f, without 'module.'.

    Args:
      path: path of the parameter in our network, such as 'conv_in/kernel'; the name of a
        spectrally normalised kernel is that of the raw one, 'weight_orig'.
      N: number of blocks per resolution.
    """
    module, *inner, leaf = path.split("/")
    layers = [ENERGY_LAYERS.get(module, module)]
    if module.startswith("level_"):
        _, resolution, _, block = module.split("_")
        layers = [f"module_list.{1 + int(resolution) * (N + 1) + int(block)}"]
    if leaf == "g":
        return f"{layers[0]}.g"
    layers += [ENERGY_INNER.get(name, name) for name in inner]
    if leaf == "kernel":
        leaf = "weight_orig" if resnet.cdrl_spectral_rule(path) else "weight"
    return ".".join([*layers, leaf])


def initialiser_name(path: str, architecture: InitialiserArchitecture, image_size: int) -> str:
    """Returns the program's name of a parameter of U, without 'module.'.

    Args:
      path: path of the parameter in our network, such as 'conv_in/kernel'.
      architecture: that of U.
      image_size: height and width of the images [pixels].
    """
    module, *inner, leaf = path.split("/")
    layers = [INITIALISER_LAYERS.get(module, module)]
    if match := re.fullmatch(r"(down|up)_(\d+)_(pool|double|block_(\d+)(_attention)?)", module):
        direction, resolution, kind, block, is_attention = match.groups()
        # One list per resolution. Attention, if there is any, follows each block except the one
        # that halves or doubles the resolution, which is the last.
        stride = 2 if image_size >> int(resolution) in architecture.attention else 1
        if direction == "up":
            folder, count = f"ups.{len(architecture.mult) - 1 - int(resolution)}", 1
        else:
            folder, count = f"downs.{resolution}", 0
        blocks = architecture.N + count if kind in ("pool", "double") else int(block)
        layers = [f"{folder}.{blocks * stride + bool(is_attention)}"]
    layers += [INITIALISER_INNER.get(name, name) for name in inner]
    return ".".join([*layers, "bias" if leaf == "bias" else "weight"])


def _energy_parameters(
    weights: Weights, architecture: EnergyArchitecture, energy: Energy
) -> tuple[Params, Params, Vectors]:
    """Returns raw parameters, averaged parameters and vectors of the energy.

    Raises:
      UserError: if a tensor is missing, unexpected or of the wrong shape.
    """
    shapes, vector_shapes = jax.eval_shape(energy.init, jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    names = {path: energy_name(path, architecture.N) for path in flat}
    originals = {path: _original_shape(path, flat[path].shape) for path in flat}
    u = {path: names[path].replace("weight_orig", "weight_u") for path in vector_shapes}
    buffers = {u[path]: vector.shape for path, vector in vector_shapes.items()}
    for path in vector_shapes:
        v = names[path].replace("weight_orig", "weight_v")
        buffers[v] = (int(np.prod(originals[path][1:])),)
    params = _parameters(weights.raw, ENERGY, names, originals, buffers)
    ema = _parameters(weights.ema, ENERGY, names, originals, {})
    vectors = {path: jnp.asarray(weights.raw[name], jnp.float32) for path, name in u.items()}
    return params, ema, vectors


def _initialiser_parameters(
    weights: Weights,
    architecture: InitialiserArchitecture,
    network: nn.Module,
    shape: tuple[int, ...],
) -> tuple[Params, Params]:
    """Returns raw and averaged parameters of the initialiser, for images of a shape.

    Raises:
      UserError: if a tensor is missing, unexpected or of the wrong shape.
    """
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1))
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    names = {path: initialiser_name(path, architecture, shape[0]) for path in flat}
    originals = {path: _original_shape(path, flat[path].shape) for path in flat}
    raw, ema = (
        _parameters(tensors, INITIALISER, names, originals, {})
        for tensors in (weights.raw, weights.ema)
    )
    return raw, ema


# Layers whose kernel [in, out] is that of a 1x1 convolution, [out, in, 1, 1], in the program.
POINTWISE = ("skip", "qkv", "out")


def _original_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a parameter in the program."""
    *_, module, leaf = path.split("/")
    if leaf == "g":
        return (1, *shape, 1, 1)
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    pointwise = (1, 1) if len(shape) == 2 and module in POINTWISE else ()
    return (*shape[::-1], *pointwise)


def _parameters(
    tensors: Tensors,
    network: str,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, tuple[int, ...]],
) -> Params:
    """Returns the parameters of a network.

    Args:
      tensors: all tensors of the network.
      network: the program's name of the network.
      names: the program's name of each parameter, by its path in our network.
      shapes: shape of each parameter in the program, likewise.
      buffers: names and shapes of the tensors that must also exist.

    Raises:
      UserError: if a tensor is missing, unexpected or of the wrong shape.
    """
    expected = {names[path]: shape for path, shape in shapes.items()} | dict(buffers)
    title = f"the CDRL checkpoint's {network}_state_dict"
    if missing := expected.keys() - tensors.keys():
        raise UserError(f"{title} lacks {_some(missing)}: give a complete checkpoint")
    if unexpected := tensors.keys() - expected.keys():
        raise UserError(
            f"{title} holds {_some(unexpected)}, which CDRL's network does not have: only the "
            "networks of the authors' CDRL program can be read"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{title} holds module.{name} of shape {list(tensors[name].shape)}, not "
                f"{list(shape)}: only the networks of the authors' CDRL program can be read"
            )
    arrays = {path: jnp.asarray(_to_ours(path, tensors[name])) for path, name in names.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _to_ours(path: str, tensor: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
    """Returns a tensor of the program as a parameter of our network, in float32."""
    *_, module, leaf = path.split("/")
    if leaf != "kernel":
        return tensor.reshape(-1).astype(np.float32)
    if module in POINTWISE and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    axes = (2, 3, 1, 0) if tensor.ndim == 4 else (1, 0)
    return tensor.transpose(axes).astype(np.float32)


def _some(names: Collection[str]) -> str:
    """Returns the first name in alphabetical order, and the number of the others."""
    first, *others = sorted(names)
    return f"module.{first}" + (f" and {len(others)} more" if others else "")
