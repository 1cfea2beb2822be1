"""The comparison with a flow: its bound of bits per dimension, and its command line.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from drl_jax import diffusion
from drl_jax.tools import flow

SCHEDULE = diffusion.schedule(30, "cosine", 0.15)
VALUES = 17  # of a pixel


def test_the_bound_is_exact_for_pixels_whose_density_is_known():
    """Pixels with the values of a discretised normal distribution, and the density of x_0.

    The expected bound is -E log2 P(v | x_0) of independent pixels, by Monte Carlo. The
    tolerance is five standard errors. Fails without the volume of a bin, without the noise, or
    in nats.
    """
    v = np.linspace(-1, 1, VALUES)
    p = np.exp(-((v / 0.4) ** 2) / 2)
    p /= p.sum()
    rng = np.random.default_rng(0)
    x = rng.choice(v, p=p, size=(3000, 4, 4, 1)).astype(np.float32)
    a_bar, sigma_bar = float(SCHEDULE.a_bar[0]), float(SCHEDULE.sigma_bar[0])
    index = rng.choice(VALUES, p=p, size=200_000)
    x_0 = a_bar * v[index] + sigma_bar * rng.normal(size=len(index))
    log_q = -(((x_0[:, None] - a_bar * v) / sigma_bar) ** 2) / 2
    log_sum = special.logsumexp(log_q, axis=1)
    nats = log_sum - special.logsumexp(log_q, b=p, axis=1)
    expected, spread = nats.mean() / math.log(2), nats.std() / math.log(2)

    def log_prob(x_0):
        of_values = jnp.log(p) - ((x_0[..., None] - a_bar * v) / sigma_bar) ** 2 / 2
        normal = math.log(sigma_bar * math.sqrt(2 * math.pi))
        return jnp.sum(jax.nn.logsumexp(of_values, axis=2) - normal, axis=1)

    bits, error = flow.bits_per_dim(log_prob, jax.random.key(0), x, VALUES, SCHEDULE)
    assert abs(bits - expected) < 5 * math.hypot(error, spread / len(index) ** 0.5)
    np.testing.assert_allclose(error, spread / x.size**0.5, rtol=0.1)


def test_the_noise_is_that_of_level_0_and_other_keys_give_other_noise():
    x = jnp.full((5000, 2, 2, 1), 0.5)
    z = (flow.noisy(jax.random.key(0), x, SCHEDULE) - SCHEDULE.a_bar[0] * 0.5) / 0.15
    assert stats.kstest(np.ravel(z), "norm").pvalue > 1e-6
    other = flow.noisy(jax.random.key(1), x, SCHEDULE)
    assert not np.allclose(other, flow.noisy(jax.random.key(0), x, SCHEDULE))


def test_a_flow_is_trained_on_the_training_images_and_measured_on_the_others(
    monkeypatch, capsys
):
    seen = {}

    def train(key, x, schedule, seconds):
        seen["train"], seen["seconds"] = x, seconds
        return lambda x_0: jnp.zeros(len(x_0))

    def bits_per_dim(log_prob, key, x, values, schedule):
        seen["test"], seen["values"], seen["noise"] = x, values, float(schedule.sigma_bar[0])
        return 2.5, 0.125

    monkeypatch.setattr(flow, "train", train)
    monkeypatch.setattr(flow, "bits_per_dim", bits_per_dim)
    assert flow.main(["flow", "--seconds=7"]) == 0
    assert capsys.readouterr().out.startswith("2.500 bits per dimension, standard error")
    assert (seen["seconds"], seen["values"]) == (7, VALUES)
    assert seen["noise"] == pytest.approx(0.15)
    assert (len(seen["train"]), len(seen["test"])) == (1438, 359)
    both = np.concatenate([seen["train"], seen["test"]]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) > 1790  # no image is in both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=digits"], "this program needs images, and config.data.dequantise to be 0"),
        (["--config=toy2d"], "this program needs images"),
        (["--config=missing"], "--config=missing: no such Python file"),
        (["--seconds=0"], "flag --seconds=0"),
        (["digits"], "unexpected argument 'digits'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message, capsys):
    assert flow.main(["flow", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_flowjax_the_error_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flowjax.flows", None)
    monkeypatch.setitem(sys.modules, "flowjax", None)
    assert flow.main(["flow"]) == 1
    assert "training a flow needs flowjax, which is not installed" in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    assert flow.main(["flow", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("config", "seconds", "seed"):
        assert f"--{name} " in text
