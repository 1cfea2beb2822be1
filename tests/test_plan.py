import json
import re
import subprocess
import sys

import jax
import pytest
from etils import epath
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.tasks import plan as plan_task
from drl_jax.tools import flops
from drl_jax.tools.plan import chips

SMALL = {
    "energy.ch": 8,
    "energy.mult": "(1,)",
    "mcmc.K": 7,
    "train.batch_size": 8,
    "evaluation.batch_size": 6,
}
FIELDS = [f"--config.{name}={value}" for name, value in SMALL.items()]

# The program, which tries one batch size instead of four. `test_batches.py` tests the search.
# Before the search, it marks what it has printed so far.
PROGRAM = """
import sys
from drl_jax.tools.plan import batches
search, batches.MAX_TRIES = batches.largest, 1
def largest(*args):
    print("SEARCH")
    return search(*args)
batches.largest = largest
from drl_jax import main
sys.exit(main.main())
"""


def plan(*args):
    """Plans in a new process, since compilers read the environment only once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--mode=plan", *args],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan of a small network for v5e:2x2: output, JSON values, and work directory."""
    workdir = tmp_path_factory.mktemp("plan")
    config, topology = f"--config={tiny.DIGITS}", "--topology=v5e:2x2"
    args = config, topology, f"--workdir={workdir}", "--find_largest_batch"
    status, out, err = plan(*args, *FIELDS)
    assert status == 0, err
    return out, json.loads((workdir / "plan_v5e_2x2.json").read_text()), workdir


@pytest.mark.slow
def test_the_plan_is_written_and_printed_before_the_search_for_the_largest_batch(made):
    out, _, workdir = made
    before, after = out.split("SEARCH\n")
    assert before + after == (workdir / "plan_v5e_2x2.md").read_text()
    assert "| verdict | fits | fits |" in before
    assert re.fullmatch("\nLargest global batch size that was compiled and fits: .*\n", after)


@pytest.mark.slow
def test_memory_and_time_of_a_training_step_are_consistent(made):
    _, values, _ = made
    step, _ = values["programs"]
    config = config_lib.from_json(values["config"])
    assert (step["batch_size"], step["examples_per_device"], step["fits"]) == (8, 2, True)
    parts = step["bytes"]
    assert step["bytes_needed"] == sum(parts.values()) - 2 * parts["aliased"]
    assert step["flops_per_device"] == 2 * flops.training_step(config)
    # The chain, then positive and negative samples.
    assert [loop["trips"] for loop in step["loops"]] == [7, 2]
    seconds = step["estimated_cycles"] / chips.CHIPS["v5e"].clock
    assert step["estimated_seconds"] == pytest.approx(seconds)
    assert step["estimated_mfu"] == pytest.approx(step["seconds_at_peak"] / seconds)
    assert 0 < step["estimated_mfu"] < 1
    days = seconds * config.train.num_steps / 86400
    assert step["estimated_days"] == pytest.approx(days)


@pytest.mark.slow
def test_a_step_reduces_the_gradient_of_all_parameters_in_one_collective(made):
    _, values, _ = made
    [reduce] = values["programs"][0]["collectives"]
    energy = method.from_config(config_lib.from_json(values["config"])).energy
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (reduce["kind"], reduce["runs"], reduce["loop"]) == ("all-reduce", 1, "")
    assert size < reduce["size"] < size + 500  # the metrics are included


@pytest.mark.slow
def test_the_sampler_runs_one_chain_per_level_on_a_divisible_batch(made):
    _, values, _ = made
    _, sampler = values["programs"]
    assert sampler["batch_size"] == 8  # 6, rounded up
    assert [(loop["trips"], loop["runs"]) for loop in sampler["loops"]] == [(6, 1), (7, 6)]
    assert sampler["collectives"] == []


@pytest.mark.slow
def test_the_largest_batch_size_was_compiled_and_fits(made):
    _, values, _ = made
    largest = values["largest_batch_size"]
    assert largest == max(each["batch_size"] for each in values["tried"] if each["fits"])
    assert largest > 8
    assert largest % 4 == 0


@pytest.mark.slow
def test_the_plan_says_if_larger_batches_would_fit(made):
    """For a small network, the batch sizes tried fill only a thousandth of a chip."""
    out, values, _ = made
    needed = max(each["bytes_needed"] for each in values["tried"])
    assert needed < 0.8 * values["memory"]
    assert "Larger batch sizes, which would also fit, were not tried." in out


@pytest.mark.slow
def test_a_batch_size_that_does_not_fit_is_reported_and_no_other_is_tried():
    toy = tiny.ROOT / "configs" / "toy2d.py"
    fields = (
        "energy.ch=8",
        "energy.N=1",
        "evaluation.batch_size=4",
        "train.batch_size=400000000",
    )
    args = f"--config={toy}", "--topology=v5e:2x2", *(f"--config.{field}" for field in fields)
    status, out, err = plan(*args)
    assert status == 0, err
    assert "| verdict | **does not fit** | fits |" in out
    assert "Traceback" not in err
    assert err.count("compiling the ") == 2
    assert "ran out of device memory" in err


def test_an_indivisible_batch_size_is_reported_in_one_line():
    config = f"--config={tiny.DIGITS}"
    status, out, err = plan(config, "--topology=v3:2x2", "--config.train.batch_size=12")
    assert status == 1
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: config.train.batch_size is 12")
    assert "8 or 16" in line


@pytest.mark.parametrize("workdir", [None, "plans"])
def test_a_plan_is_written_only_to_a_given_workdir(monkeypatch, tmp_path, workdir):
    """Replaces the task, which takes long, by a function that stores its arguments."""
    received = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_task, "run", lambda **arguments: received.update(arguments))
    args = [f"--workdir={workdir}"] if workdir else []
    assert tiny.main("--mode=plan", f"--config={tiny.DIGITS}", "--topology=v5e:2x2", *args) == 0
    assert received["topology"] == "v5e:2x2"
    assert received["workdir"] == (epath.Path(workdir) if workdir else None)
    assert not list(tmp_path.iterdir())
