"""Checkpoints of the authors' TensorFlow program, as training states.

https://github.com/ruiqigao/recovery_likelihood writes TensorFlow's object-based format:

- `model/net/...` and `model_ema/net/...`, the network and its moving average. A kernel is
  `w` and its spectral vector `sn_u`; a normalised copy, `layer/W`, is not needed.
- `.../.OPTIMIZER_SLOT/opt_c/m` and `.../v` below each raw parameter, Adam's moments, and
  `opt_c/iter`, the updates behind them.
- `i_iter_var`, the training steps done.

Only the average must be there.
"""

import logging
import re
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Num
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import model, train_state
from drl_jax.energies.energy import Params, Vectors
from drl_jax.errors import UserError
from drl_jax.train_state import TrainState

log = logging.getLogger(__name__)

Tensors = dict[str, Num[np.ndarray, "..."]]  # by the name of their variable

RAW, AVERAGE = "model/", "model_ema/"
SLOT = "/.OPTIMIZER_SLOT/opt_c/"
STEP, UPDATES = "i_iter_var", "opt_c/iter"
# What names of tensors that have a meaning here, or need none, begin with.
KNOWN = (RAW, AVERAGE, STEP, "opt_c/", "save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH")


def read(prefix: str) -> Tensors:
    """Reads all tensors of a TensorFlow checkpoint.

    Args:
      prefix: of its files, such as 'ckpt' for 'ckpt.index' and 'ckpt.data-00000-of-00001'.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    import tensorflow as tf  # seconds, which nothing else here needs

    try:
        reader = tf.train.load_checkpoint(prefix)
        return {
            name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): np.asarray(
                reader.get_tensor(name)
            )
            for name in reader.get_variable_to_shape_map()
        }
    except (tf.errors.OpError, ValueError, IndexError) as error:  # the last if cut short
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--tf_checkpoint={prefix} cannot be read as a TensorFlow checkpoint ({reason}): "
            "give what the names of its .index and .data files begin with"
        ) from error


def configure(config: ConfigDict, tensors: Tensors, image_size: int) -> ConfigDict:
    """Returns the configuration with the architecture of the averaged network.

    Args:
      config: what the network does not tell: data, chain, optimiser.
      tensors: of the checkpoint.
      image_size: height and width of the images, which it does not tell either.

    Raises:
      UserError: if there is no averaged network, or it is an impossible one.
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
            f"the TensorFlow checkpoint holds no averaged network of the authors' ({first} and "
            "the levels after it): give one that their program wrote"
        )
    channels, ch = kernels[first][-2:]
    width_of_level = {level: width for (level, _), width in sorted(widths.items())}
    config = config.copy_and_resolve_references()
    config.data.image_size = image_size
    config.data.channels = channels
    config.energy.ch = ch
    config.energy.mult = tuple(width // ch for width in width_of_level.values())
    config.energy.N = 1 + max(block for _, block in widths)
    config.energy.parameterisation = "step"  # the only one that their program has
    config_lib.validate(config)
    return config


def to_state(tensors: Tensors, config: ConfigDict) -> TrainState:
    """Returns the training state that the tensors are.

    The spectral vectors are those of the averaged network, which images are generated with;
    a step of training makes them the raw network's. Without a raw network the average stands
    for it, and without Adam's moments these and the warm-up start anew: the log is told. It
    is also told what lies outside the networks and is not imported.

    Args:
      tensors: of the checkpoint.
      config: with its architecture, as `configure` returns it.

    Raises:
      UserError: if the image size does not fit the network; or naming what is missing,
        unexpected in a network, or of the wrong shape.
    """
    abstract = model.abstract_state(config)
    ema, vectors = _network(tensors, AVERAGE, abstract)
    if any(name.startswith(RAW) for name in tensors):
        params, _ = _network(tensors, RAW, abstract)
    else:
        log.info("it holds no raw parameters: the averaged ones stand for them")
        params = jax.tree.map(jnp.copy, ema)
    opt_state = train_state.optimiser(config).init(params)
    if any(SLOT in name for name in tensors):
        mu, nu = (_parameters(tensors, RAW, abstract.params, SLOT + slot) for slot in "mv")
        count = jnp.asarray(_get(tensors, {UPDATES: ()})[UPDATES], jnp.int32)
        opt_state = optax.tree.set(opt_state, count=count, mu=mu, nu=nu)
    else:
        log.info("it holds no moments of Adam: they and the warm-up start anew")
    if others := [name for name in tensors if not name.startswith(KNOWN)]:
        log.warning("not imported: %s", ", ".join(sorted(others)))
    step = _get(tensors, {STEP: ()})[STEP] if STEP in tensors else 0
    return TrainState(jnp.asarray(step, jnp.int32), params, ema, vectors, opt_state)


def original_name(path: str) -> str:
    """Returns the authors' name, inside a network, of the parameter at a path of ours."""
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


def _network(tensors: Tensors, prefix: str, abstract: TrainState) -> tuple[Params, Vectors]:
    """Returns the parameters and spectral vectors of a network, and sees that that is all."""
    params = _parameters(tensors, prefix, abstract.params)
    layers = {path: prefix + original_name(path).removesuffix("w") for path in abstract.vectors}
    shapes = {layers[path] + "sn_u": (1, *u.shape) for path, u in abstract.vectors.items()}
    u = _get(tensors, shapes)
    flat = traverse_util.flatten_dict(params, sep="/")
    expected = {prefix + original_name(path) for path in flat} | u.keys()
    expected |= {layer + "layer/W" for layer in layers.values()}
    found = {name for name in tensors if name.startswith(prefix) and SLOT not in name}
    if unexpected := found - expected:
        raise UserError(
            f"the TensorFlow checkpoint holds {_some(unexpected)}, which the network has no "
            "place for: only the paper's can be imported"
        )
    return params, {path: jnp.asarray(u[layers[path] + "sn_u"][0]) for path in layers}


def _parameters(tensors: Tensors, prefix: str, abstract: Params, suffix: str = "") -> Params:
    """Returns the tensors whose names are those of parameters, between prefix and suffix."""
    flat = traverse_util.flatten_dict(abstract, sep="/")
    names = {path: prefix + original_name(path) + suffix for path in flat}
    found = _get(tensors, {names[path]: like.shape for path, like in flat.items()})
    arrays = {path: jnp.asarray(found[name]) for path, name in names.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _get(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Returns the tensors of these names, all of which must be there in these shapes."""
    if missing := shapes.keys() - tensors.keys():
        raise UserError(
            f"the TensorFlow checkpoint lacks {_some(missing)}: give one that was written whole"
        )
    found = {name: tensors[name] for name in shapes}
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(
                f"the TensorFlow checkpoint's {name} is {list(found[name].shape)}, not "
                f"{list(shape)}: only the paper's network can be imported"
            )
    return found


def _some(names: Collection[str]) -> str:
    """Returns the first of the names, and how many more there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
