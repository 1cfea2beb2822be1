"""Checkpoints like those of the authors' TensorFlow program, as tensors by name."""

import numpy as np

from drl_jax.storage import tf_checkpoint
from helpers.fixtures import ORIGINAL


def untrained():
    """Returns the fixture's tensors: the average equals the raw network; no Adam moments."""
    tensors = tf_checkpoint.read(str(ORIGINAL / "ckpt"))
    del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]
    return tensors


def trained():
    """Returns tensors as in the middle of training: raw network, average and moments differ."""
    tensors = untrained()
    trained = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("model/"):
            trained[name] = tensor + 1
        if name.startswith("model/") and name.endswith(("/w", "/b", "/g", "dense_2/dense/W")):
            trained[f"{name}/.OPTIMIZER_SLOT/opt_c/m"] = tensor + 2
            trained[f"{name}/.OPTIMIZER_SLOT/opt_c/v"] = tensor + 3
    counters = {"i_iter_var": np.array(5000, np.int32), "opt_c/iter": np.array(5001)}
    return trained | counters | {"opt_c/beta_1": np.array(0.9, np.float32)}


def write(prefix, tensors):
    """Writes tensors, under the names that `tf_checkpoint.read` returns, with TensorFlow."""
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in tensors],
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )
