"""What the energies of the classes say about labels: a classifier p(label | x).

By Bayes' rule, p(label | x) ∝ exp(F(x, t, label) + b[label]). F is only known up to a constant
for each label. b makes up for these: it is the logarithm of the label's prior, minus log Z.
With labelled data, maximum likelihood finds it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from scipy.special import log_softmax, logsumexp

from drl_jax import diffusion, noise, recovery
from drl_jax.model import Model

ITERATIONS = 1000  # of `fit_prior`


def fit_prior(
    log_p: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "classes"]:
    """Returns the b that maximises the likelihood of labels, given log p(label | x) for b = 0.

    Each iteration adds log(number of examples with the label / sum of p(label | x)). This never
    lowers the likelihood (generalised iterative scaling; Darroch and Ratcliff 1972).

    Args:
      log_p: log p(label | x) for labels 1, ..., classes.
      labels: the labels of the examples, in 1..classes.

    Returns:
      b, whose mean is 0. It is minus infinity for labels without examples.
    """
    counts = np.bincount(labels - 1, minlength=log_p.shape[1])
    found, b = counts > 0, np.full(log_p.shape[1], -np.inf)
    b[found] = 0
    for _ in range(ITERATIONS):
        p = log_softmax((log_p + b)[:, found], axis=1)
        b[found] += np.log(counts[found]) - logsumexp(p, axis=0)
    b[found] -= b[found].mean()
    return b


def accuracy(log_p: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> float:
    """Returns the share of examples whose most probable label, in 1..classes, is theirs."""
    return float(np.mean(log_p.argmax(axis=1) + 1 == labels))


def classify_data(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n *D"], level: int
) -> Float[np.ndarray, "n classes"]:
    """Returns log p(label | y) for data diffused to a level, y, and b = 0.

    Args:
      model: a model with classes.
      key: random key of the noise.
      x: data, images in [-1, 1] or points.
      level: t in 0..T-1.
    """
    rows, standardisation = model.engine.batch_size, model.standardisation
    log_p = []
    for start in range(0, len(x), rows):
        part = jnp.asarray(standardisation.apply(x[start : start + rows]))
        keys = noise.example_keys(key, start + jnp.arange(len(part)))
        t = jnp.full(len(part), level)
        y, _ = recovery.positives(keys, part, t, model.method.schedule)
        log_p.append(np.asarray(model.classify(standardisation.invert(y), t), np.float64))
    return np.concatenate(log_p)


def compare(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "n *D"],
    labels: Int[np.ndarray, "n"],
    x_test: Float[np.ndarray, "m *D"],
    labels_test: Int[np.ndarray, "m"],
) -> dict[str, Any]:
    """Classifies test data by the energies of the best level.

    Of the first levels of the `diffusion.level_groups`, this is the one with the highest
    accuracy on the other data, to which b is fitted, too.

    Args:
      model: a model with classes.
      key: random key of the noise.
      x: data with labels.
      labels: their labels, in 1..classes.
      x_test: test data.
      labels_test: their labels.

    Returns:
      JSON values: level; log_prior, which is b; num_data, num_test; accuracy, and
      accuracy_of_test.
    """
    noise_key, test_key = jax.random.split(key)
    results = []
    for group in diffusion.level_groups(model.T):
        log_p = classify_data(model, jax.random.fold_in(noise_key, group[0]), x, group[0])
        b = fit_prior(log_p, labels)
        results.append((accuracy(log_p + b, labels), group[0], b))
    best, level, b = max(results, key=lambda result: result[:2])
    log_p = classify_data(model, test_key, x_test, level)
    return {
        "level": level,
        "log_prior": b.tolist(),
        "num_data": len(x),
        "num_test": len(x_test),
        "accuracy": best,
        "accuracy_of_test": accuracy(log_p + b, labels_test),
    }
