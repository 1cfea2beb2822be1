"""Checkpoints of the authors' TensorFlow program.

https://github.com/ruiqigao/recovery_likelihood writes TensorFlow's object-based format:

- `model/net/...`: the raw parameters of the network; `model_ema/net/...`: their exponential
  moving average. A kernel is called `w`, and the vector of its spectral normalisation `sn_u`;
  `layer/W` is a normalised copy of the kernel, which is not needed.
- `.../.OPTIMIZER_SLOT/opt_c/m` and `.../v` after the name of a raw parameter: Adam's first and
  second moment; and `opt_c/iter`: the number of updates.
- `i_iter_var`: the number of training steps.

Only the averaged network must be present.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Int, Shaped
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.errors import UserError, not_installed
from drl_jax.networks.energy import Params, Vectors

log = logging.getLogger(__name__)

Tensors = dict[str, Shaped[np.ndarray, "..."]]  # by the name of the variable

RAW, AVERAGE = "model/", "model_ema/"
SLOT = "/.OPTIMIZER_SLOT/opt_c/"
STEP, UPDATES = "i_iter_var", "opt_c/iter"
# Prefixes of the tensors that are imported or are known to be unnecessary.
KNOWN = (RAW, AVERAGE, STEP, "opt_c/", "save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH")


class Moments(NamedTuple):
    """State of Adam.

    Attributes:
      updates: number of updates.
      mu: first moments of the raw parameters' gradients.
      nu: second moments.
    """

    updates: Int[Array, ""]
    mu: Params
    nu: Params


class Parts(NamedTuple):
    """The parts of a training state that a checkpoint holds.

    Attributes:
      step: number of training steps; 0 if the checkpoint does not record it.
      params: raw parameters; None if there are none.
      ema: exponential moving average of the raw parameters.
      vectors: vectors of the power iterations (spectral normalisation) of the averaged network.
      moments: state of Adam; None if there is none.
    """

    step: Int[Array, ""]
    params: Params | None
    ema: Params
    vectors: Vectors
    moments: Moments | None


def read(prefix: str) -> Tensors:
    """Reads all tensors of a TensorFlow checkpoint.

    Args:
      prefix: common prefix of the checkpoint's files, such as 'ckpt' for 'ckpt.index' and
        'ckpt.data-00000-of-00001'.

    Raises:
      UserError: if there is no checkpoint, it is damaged, or TensorFlow is not installed.
    """
    try:
        import tensorflow as tf  # takes seconds, and only this function needs it
    except ImportError as error:
        raise not_installed("reading a TensorFlow checkpoint", "tensorflow") from error
    try:
        reader = tf.train.load_checkpoint(prefix)
        return {
            name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): np.asarray(
                reader.get_tensor(name)
            )
            for name in reader.get_variable_to_shape_map()
        }
    except (tf.errors.OpError, ValueError, IndexError) as error:  # IndexError: a short file
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--tf_checkpoint={prefix} cannot be read as a TensorFlow checkpoint ({reason}): "
            "give the common prefix of the .index and .data files"
        ) from error


def configure(config: ConfigDict, tensors: Tensors, image_size: int) -> ConfigDict:
    """Returns the configuration with the architecture of the averaged network.

    Args:
      config: configuration whose fields that do not describe the architecture are kept.
      tensors: tensors of the checkpoint.
      image_size: height and width of the images, which the checkpoint does not record.

    Raises:
      UserError: if there is no averaged network, or its architecture is impossible.
    """
    kernels = {name: tensor.shape for name, tensor in tensors.items() if tensor.ndim == 4}
    first = AVERAGE + "net/conv2d_in/conv/w"
    pattern = re.compile(AVERAGE + r"net/res_levels/(\d+)/(\d+)/conv2d_1/conv/w")
    widths = {
        (int(match[1]), int(match[2])): shape[-1]
        for name, shape in kernels.items()
        if (match := pattern.fullmatch(name))
    }
    if first not in kernels or not widths:
        raise UserError(
            f"the TensorFlow checkpoint has no averaged network ({first} and the residual "
            "blocks): give one that the authors' program wrote"
        )
    channels, ch = kernels[first][-2:]
    width_of_level = {level: width for (level, _), width in sorted(widths.items())}
    config = config.copy_and_resolve_references()
    config.data.axes, config.data.image_size = 2, image_size
    config.data.channels = channels
    config.data.classes = 0
    config.initialiser = config_lib.default().initialiser
    config.energy.network = "resnet"
    config.energy.ch = ch
    config.energy.mult = tuple(width // ch for width in width_of_level.values())
    config.energy.N = 1 + max(block for _, block in widths)
    config.energy.parameterisation = "step"  # the only one that their program has
    config_lib.validate(config)
    return config


def extract(tensors: Tensors, config: ConfigDict) -> Parts:
    """Returns the parts of a training state, and logs which tensors are not imported.

    The vectors of the power iterations are those of the averaged network, which generates
    images. The first training step updates them for the raw network.

    Args:
      tensors: tensors of the checkpoint.
      config: configuration with the architecture of its network, as returned by `configure`.

    Raises:
      UserError: if the image size does not fit the network, or a tensor of a network is
        missing, unexpected or of the wrong shape; the message names it.
    """
    energy = method.from_config(config).energy
    shapes, vector_shapes = jax.eval_shape(energy.init, jax.random.key(0))
    ema, vectors = _network(tensors, AVERAGE, shapes, vector_shapes)
    params, moments = None, None
    if any(name.startswith(RAW) for name in tensors):
        params, _ = _network(tensors, RAW, shapes, vector_shapes)
    if any(SLOT in name for name in tensors):
        updates = jnp.asarray(_get(tensors, {UPDATES: ()})[UPDATES], jnp.int32)
        mu, nu = (_parameters(tensors, RAW, shapes, SLOT + slot) for slot in ("m", "v"))
        moments = Moments(updates, mu, nu)
    if others := [name for name in tensors if not name.startswith(KNOWN)]:
        log.warning("not imported: %s", ", ".join(sorted(others)))
    step = _get(tensors, {STEP: ()})[STEP] if STEP in tensors else 0
    return Parts(jnp.asarray(step, jnp.int32), params, ema, vectors, moments)


def original_name(path: str) -> str:
    """Returns the authors' name of a parameter, without the prefix of the network.

    Args:
      path: path of the parameter in this package's network, such as 'conv_in/kernel'.
    """
    module, *inner, leaf = path.split("/")
    if module == "head":
        return "net/temb_dense_2/dense/" + {"kernel": "W", "bias": "b"}[leaf]
    if module == "conv_in":
        layer = "conv2d_in/conv"
    elif module.startswith("temb"):
        layer = f"temb_dense_{module[-1]}/dense"
    else:
        _, level, _, block = module.split("_")
        kind = {
            "conv1": "conv2d_1/conv",
            "conv2": "conv2d_2/conv",
            "skip": "conv2d_shortcut/conv",
            "dense": "dense/dense",
        }[inner[0]]
        layer = f"res_levels/{level}/{block}/{kind}"
    return f"net/{layer}/" + {"kernel": "w", "bias": "layer/b", "g": "layer/g"}[leaf]


def _network(
    tensors: Tensors,
    prefix: str,
    shapes: Params,
    vector_shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[Params, Vectors]:
    """Returns the parameters of a network and the vectors of its power iterations.

    Raises:
      UserError: if any is missing or of the wrong shape, or the network has further tensors.
    """
    params = _parameters(tensors, prefix, shapes)
    layers = {path: prefix + original_name(path).removesuffix("w") for path in vector_shapes}
    u = _get(
        tensors, {layers[path] + "sn_u": (1, *u.shape) for path, u in vector_shapes.items()}
    )
    flat = traverse_util.flatten_dict(params, sep="/")
    expected = {prefix + original_name(path) for path in flat} | u.keys()
    expected |= {layer + "layer/W" for layer in layers.values()}
    found = {name for name in tensors if name.startswith(prefix) and SLOT not in name}
    if unexpected := found - expected:
        raise UserError(
            f"the TensorFlow checkpoint holds {_some(unexpected)}, which the paper's network "
            "does not have: only the paper's network can be imported"
        )
    return params, {path: jnp.asarray(u[layers[path] + "sn_u"][0]) for path in layers}


def _parameters(tensors: Tensors, prefix: str, shapes: Params, suffix: str = "") -> Params:
    """Returns the tensors named prefix + parameter + suffix, as a pytree of parameters.

    Raises:
      UserError: if any is missing or of the wrong shape.
    """
    flat = traverse_util.flatten_dict(shapes, sep="/")
    names = {path: prefix + original_name(path) + suffix for path in flat}
    found = _get(tensors, {names[path]: array.shape for path, array in flat.items()})
    arrays = {path: jnp.asarray(found[name]) for path, name in names.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _get(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Returns the tensors with these names.

    Raises:
      UserError: if any is missing or does not have the given shape.
    """
    if missing := shapes.keys() - tensors.keys():
        raise UserError(
            f"the TensorFlow checkpoint lacks {_some(missing)}: give a complete one"
        )
    found = {name: tensors[name] for name in shapes}
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(
                f"the TensorFlow checkpoint's {name} has shape {list(found[name].shape)}, not "
                f"{list(shape)}: only the paper's network can be imported"
            )
    return found


def _some(names: Collection[str]) -> str:
    """Returns the first name in alphabetical order, and the number of the others."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
