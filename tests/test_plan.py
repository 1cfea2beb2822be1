import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from etils import epath
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax import main as main_lib
from drl_jax import model
from drl_jax.errors import UserError
from drl_jax.tools import flops
from drl_jax.tools.plan import chips, programs

SMALL = {
    "energy.ch": 8,
    "energy.mult": "(1,)",
    "mcmc.K": 7,
    "train.batch_size": 8,
    "evaluation.batch_size": 6,
}
FIELDS = [f"--config.{name}={value}" for name, value in SMALL.items()]


def plan(*args):
    """Plans in a process of its own, since compilers read the environment once."""
    process = tiny.start(
        "--mode=plan", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, *process.communicate(timeout=500)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan of a small network for v5e:2x2, as it was printed and written."""
    workdir = tmp_path_factory.mktemp("plan")
    config, topology = f"--config={tiny.DIGITS}", "--topology=v5e:2x2"
    process, out, err = plan(config, topology, f"--workdir={workdir}", *FIELDS)
    assert process.returncode == 0, err
    return out, json.loads((workdir / "plan_v5e_2x2.json").read_text()), workdir


def test_a_plan_is_printed_as_it_is_written(made):
    out, _, workdir = made
    assert out == (workdir / "plan_v5e_2x2.md").read_text()
    assert "| verdict | fits | fits |" in out


def test_a_training_step_is_as_large_and_slow_as_its_parts(made):
    _, values, _ = made
    step, _ = values["programs"]
    config = config_lib.from_json(values["config"])
    assert (step["batch_size"], step["examples_per_device"], step["fits"]) == (8, 2, True)
    parts = step["bytes"]
    assert step["bytes_needed"] == sum(parts.values()) - 2 * parts["aliased"]
    assert step["flops_per_device"] == 2 * flops.training_step(config)
    # The chain, then the two phases of the loss.
    assert [loop["trips"] for loop in step["loops"]] == [7, 2]
    seconds = step["estimated_cycles"] / chips.CHIPS["v5e"].clock
    assert step["estimated_seconds"] == pytest.approx(seconds)
    assert step["estimated_mfu"] == pytest.approx(step["seconds_at_peak"] / seconds)
    assert 0 < step["estimated_mfu"] < 1
    days = seconds * config.train.num_steps / 86400
    assert step["estimated_days"] == pytest.approx(days)


def test_the_step_adds_the_gradient_of_all_parameters_up_once(made):
    _, values, _ = made
    [reduce] = values["programs"][0]["collectives"]
    params = model.abstract_state(config_lib.from_json(values["config"])).params
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (reduce["kind"], reduce["runs"], reduce["loop"]) == ("all-reduce", 1, "")
    assert weights < reduce["size"] < weights + 500  # and the metrics


def test_the_sampler_runs_a_chain_a_level_on_a_batch_that_devices_share(made):
    _, values, _ = made
    _, sampler = values["programs"]
    assert sampler["batch_size"] == 8  # 6, filled up
    assert [(loop["trips"], loop["runs"]) for loop in sampler["loops"]] == [(6, 1), (7, 6)]
    assert sampler["collectives"] == []


def test_the_largest_batch_was_compiled_and_fits(made):
    _, values, _ = made
    largest = values["largest_batch_size"]
    assert largest == max(each["batch_size"] for each in values["tried"] if each["fits"])
    assert largest > 8
    assert largest % 4 == 0


def test_it_is_told_that_larger_batches_would_fit(made):
    """Of so small a network the first few batches fill a thousandth of a chip."""
    out, values, _ = made
    needed = max(each["bytes_needed"] for each in values["tried"])
    assert needed < 0.8 * values["memory"]
    assert "Larger ones, which would fit too, were not tried." in out


def test_a_batch_that_is_far_too_big_does_not_fit_and_one_that_does_is_told():
    toy = tiny.ROOT / "configs" / "toy2d.py"
    fields = (
        "energy.ch=8",
        "energy.N=1",
        "evaluation.batch_size=4",
        "train.batch_size=400000000",
    )
    args = f"--config={toy}", "--topology=v5e:2x2", *(f"--config.{field}" for field in fields)
    process, out, err = plan(*args)
    assert process.returncode == 0, err
    assert "| verdict | **does not fit** | fits |" in out
    assert "Traceback" not in err
    assert "the compiler finds no room" in err
    largest = int(out.partition("compiled and fits: ")[2].split()[0])
    assert 10_000_000 < largest < 400_000_000
    assert "were not tried" not in out


def test_a_batch_that_devices_cannot_share_is_refused_in_one_line():
    config = f"--config={tiny.DIGITS}"
    process, out, err = plan(config, "--topology=v3:2x2", "--config.train.batch_size=12")
    assert process.returncode == 1
    assert out == ""
    message = "train.batch_size is 12, not divisible by 8 devices: use 8 or 16"
    assert err.splitlines()[-1] == f"error: config.{message}"


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_there_is_one_line(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"not installed: pip install 'drl_jax\[{extra}\]'"):
        programs.mesh_of(chips.parse(topology))


def test_devices_are_as_many_as_the_compiler_has_for_the_topology():
    names = ["v3:2x2", "v4:2x2x1", "v4:4x4x4", "v5e:1x1", "v5e:16x16", "v5p:2x2x1", "v6e:2x4"]
    code = (
        "import sys; from drl_jax.tools.plan import chips, programs\n"
        "for name in sys.argv[1:]: print(programs.mesh_of(chips.parse(name)).size)"
    )
    environment = os.environ | chips.parse("v5e:1x1").environment
    command = [sys.executable, "-c", code, *names]
    out = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert list(map(int, out.split())) == [chips.parse(name).devices for name in names]


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (67.98G) exceeds available HBM (15.75G).",
            67.98 * 2**30,
        ),
        ("XLA:TPU compile permanent error. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_what_a_refused_program_needs_is_read_from_the_refusal(message, size):
    assert programs.exhausted(message) == size


def test_a_plan_without_a_workdir_leaves_nothing_behind():
    values, _ = main_lib.parse(
        ["", "--mode=plan", f"--config={tiny.DIGITS}", "--topology=v5e:2x2"]
    )
    assert main_lib.pick_workdir(values) is None
    values, _ = main_lib.parse(
        ["", "--mode=plan", *FIELDS, "--config=a.py", "--topology=v5e:2x2", "--workdir=b"]
    )
    assert main_lib.pick_workdir(values) == epath.Path("b")
