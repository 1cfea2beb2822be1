import copy
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from helpers import tiny, toy
from helpers.runs import assert_same, state_of, steps, wait_until
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax import config as config_lib
from drl_jax import diffusion, recovery
from drl_jax import method as method_lib
from drl_jax.data import sources
from drl_jax.errors import UserError
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler
from drl_jax.storage.checkpoints import Checkpoints
from drl_jax.training import loop
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step
from drl_jax.training.step import Metrics

LIMITS = loop.Limits(loss=100.0, f=1e4)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "run"


# --- one run that is started four times ---


class Record(NamedTuple):
    """The results of a run that was killed once and stopped twice before it finished.

    Attributes:
      workdir: work directory.
      terminal: output of the second start, which is on a terminal.
      logs: output of each of the other starts, which write to files.
      stops: exit status after each SIGTERM, and the time until the process ended [s].
      compiled: programs that were not in the compilation cache.
    """

    workdir: epath.Path
    terminal: str
    logs: list[str]
    stops: list[tuple[int, float]]
    compiled: set[str]


LINE = "a line from another thread"

# The program, with another thread that writes log lines.
PROGRAM_AND_LOGGER = f"""
import logging, sys, threading, time
def write_lines():
    while True:
        logging.getLogger("drl_jax.other").warning({LINE!r})
        time.sleep(0.05)
threading.Thread(target=write_lines, daemon=True).start()
from drl_jax import main
sys.exit(main.main(sys.argv))
"""


def cached_programs():
    return {path.name for path in tiny.COMPILED.iterdir()}


def stop(process):
    """Sends SIGTERM and returns the exit status and the time until the process ended [s]."""
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60), time.monotonic() - begun


def stop_on_a_terminal(args, condition):
    """Runs the program on a terminal and stops it once `condition()` is true.

    Returns its output and the result of `stop`.
    """
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    chunks = []

    def read():
        try:
            while chunk := os.read(controller, 4096):
                chunks.append(chunk)
        except OSError:  # the terminal has been closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM_AND_LOGGER, *args],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        wait_until(condition, process)
        stopped = stop(process)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(controller)
    return b"".join(chunks).decode(), stopped


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    with mock.patch.object(tiny, "COMPILED", folder / "compiled"):  # counted below
        return make_record(folder)


def make_record(folder):
    # Compiles every program, in a process of its own: earlier tests affect what JAX traces in
    # this one, and with it the names of the programs in the cache.
    assert tiny.start(*tiny.training(folder / "first", train__num_steps=2)).wait() == 0
    cached = cached_programs()
    workdir = epath.Path(folder) / "run"
    args = tiny.training(workdir)
    logs, stops = [], []

    def names():
        checkpoints = workdir / "checkpoints"
        return {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()

    def writing():
        return any("tmp" in name for name in names())

    def new_checkpoint():
        before = {name for name in names() if name.isdecimal()}
        return lambda: {name for name in names() if name.isdecimal()} - before

    def run(condition, end):
        """Runs the program with its output in a file, and ends it once the condition holds."""
        with (folder / f"log_{len(logs)}").open("w+") as log:
            process = tiny.start(*args, stdout=log, stderr=log)
            try:
                wait_until(condition, process)
                end(process)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            logs.append(log.read())

    run(writing, subprocess.Popen.kill)
    terminal, stopped = stop_on_a_terminal(args, new_checkpoint())
    stops.append(stopped)
    run(new_checkpoint(), lambda process: stops.append(stop(process)))
    run(lambda: True, lambda process: process.wait(timeout=300))
    return Record(workdir, terminal, logs, stops, cached_programs() - cached)


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_is_bit_identical_to_an_uninterrupted_one(record):
    assert_same(state_of(record.workdir), state_of(tiny.trained()))
    for name in ("metrics.json", "samples.png"):
        assert (record.workdir / name).read_bytes() == (tiny.trained() / name).read_bytes()
    assert [
        path.name for path in (record.workdir / "checkpoints").iterdir() if "." in path.name
    ] == []


@pytest.mark.slow
def test_sigterm_saves_the_state_and_ends_the_run_within_seconds_with_status_143(record):
    saved = []
    for text, (status, seconds) in zip(
        (record.terminal, record.logs[1]), record.stops, strict=True
    ):
        assert status == 143
        assert seconds < 10
        (step,) = re.findall(
            r"^stopped by signal 15; step (\d+) [^\n]*\r?$", text, re.MULTILINE
        )
        saved.append(int(step))
    resumed = [re.search(r"resuming from step (\d+) of 300", log) for log in record.logs]
    assert resumed[0] is None
    starts = [int(found[1]) for found in resumed[1:]]
    assert starts == sorted(set(starts))
    assert saved == starts


@pytest.mark.slow
def test_log_lines_do_not_break_the_progress_bar_on_a_terminal(record):
    bars = re.findall(
        r"(\d+)/300 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, loss=-?\d+\.\d{4}\]", record.terminal
    )
    assert len(set(bars)) > 2
    # What a terminal shows: a carriage return overwrites the line.
    shown = [
        line.rpartition("\r")[2] for line in record.terminal.replace("\r\n", "\n").split("\n")
    ]
    assert shown.count(LINE) > 5
    assert {line for line in shown if LINE in line} == {LINE}
    assert "step 50/300" not in record.terminal  # such lines are only in log files


@pytest.mark.slow
def test_a_log_file_contains_only_plain_lines(record):
    known = [
        r"(devices|data|network|steps|output)  .*",
        r"compiling the training step",
        r"resuming from step \d+ of 300",
        r"step \d+/300(  [\d.]+ steps/s  \d\d:\d\d:\d\d left)?  loss -?\d\.\d{5}",
        r"stopped by signal 15; step \d+ .*",
        r"not comparing samples with a classifier of the data, .*",
        r"pixel Fréchet distance .*",
        r"wrote samples\.png and metrics\.json to .*",
    ]
    for log in record.logs:
        for line in log.splitlines():
            assert any(re.fullmatch(pattern, line) for pattern in known), line
    assert "step 300/300" in record.logs[-1]


@pytest.mark.slow
def test_later_starts_compile_neither_the_step_nor_the_sampler_again(record):
    assert any(name.startswith("jit_step-") for name in cached_programs())
    assert not [
        name for name in record.compiled if name.startswith(("jit_step-", "jit_program-"))
    ]


# --- tests in this process ---


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run on points: its work directory, its configuration, and states of steps 3 and 7."""
    config = toy.toy(energy__ch=8, energy__N=1, train__num_steps=300, train__batch_size=16)
    energy, states = method_lib.from_config(config).energy, {}
    workdir = epath.Path(tmp_path_factory.mktemp("untrained"))
    with Checkpoints(workdir, config) as checkpoints:
        for step in (3, 7):
            key = jax.random.key(100 + step)
            state = train_state.create(key, energy, train_state.optimiser(config))
            ema = jax.tree.map(lambda a: a + 0.5, state.params)
            states[step] = state.replace(step=jnp.int32(step), ema=ema)
            checkpoints.save(step, states[step])
    return workdir, config, states


@pytest.fixture
def begun(monkeypatch, caplog):
    """Returns a function like `loop.train` that returns the state before its first step."""
    caplog.set_level("INFO", logger="drl_jax")
    states = []
    monkeypatch.setattr(loop, "fit", lambda state, *_: states.append(state) or state)

    def begin(config, workdir, **options):
        loop.train(config, sources.open_source(config), workdir, **options)
        return states.pop()

    return begin


def changed(config, changes):
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_resumes_with_changes_only_on_request(untrained, begun, tmp_path, caplog):
    workdir, config, states = untrained
    workdir = shutil.copytree(workdir, epath.Path(tmp_path) / "run")
    other = changed(config, {"optim.learning_rate": 0.5, "mcmc.K": 3, "log.every_steps": 7})
    with pytest.raises(UserError, match=r"learning_rate was 0\.005, now 0\.5\)"):
        begun(other, workdir)
    caplog.clear()
    assert_same(begun(other, workdir, resume_with_changes=True), states[7])
    assert [line for line in caplog.messages if "resuming" in line or "config." in line] == [
        "resuming from step 7 of 300",
        "  config.log.every_steps was 500, now 7",
        "  config.mcmc.K was 0, now 3",
        "  config.optim.learning_rate was 0.005, now 0.5",
    ]


@pytest.mark.parametrize(("suffix", "step"), [("", 7), (":3", 3)])
def test_a_new_run_starts_from_the_parameters_of_another(
    untrained, begun, workdir, suffix, step, caplog
):
    """Fails if the other run's optimiser or number of steps is used, or the wrong step."""
    other_workdir, config, states = untrained
    config = changed(config, {"diffusion.T": 501, "seed": 3})
    state = begun(config, workdir, init_from=f"{other_workdir}{suffix}")
    start = states[step]
    training = train_step.from_config(config)
    assert_same(state.params, start.params)
    assert_same(state.ema, start.ema)
    assert_same(state.vectors, start.vectors)
    assert_same(state.opt_state, training.optimiser.init(start.params))
    assert state.step == 0
    assert f"of another run, after {step} steps" in caplog.text
    assert "  config.diffusion.T was 1000, now 501" in caplog.messages


def test_a_run_that_has_checkpoints_resumes_instead_of_starting_from_another(untrained, begun):
    workdir, config, states = untrained
    assert_same(begun(config, workdir, init_from="nonesuch"), states[7])


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"resume_with_changes": True}, "--resume_with_changes: there is no checkpoint in"),
        ({}, {"init_from": "nonesuch"}, "there is no checkpoint in nonesuch"),
        ({"mcmc.levels": 2}, {}, "mcmc.levels is 2, but all levels are trained"),
        ({}, {"init_from": "UNTRAINED:5"}, "no checkpoint of step 5 in .*: the steps are 7, 3"),
        (
            {"energy.ch": 16, "seed": 1},
            {"init_from": "UNTRAINED"},
            r"do not fit the network of this configuration \(energy.ch was 8, now 16\)",
        ),
    ],
)
def test_a_start_that_is_impossible_is_one_line_and_leaves_no_folder(
    untrained, begun, workdir, changes, options, words
):
    other_workdir, config, _ = untrained
    if "init_from" in options:
        name = options["init_from"].replace("UNTRAINED", str(other_workdir))
        options = {"init_from": name}
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        begun(changed(config, changes), workdir, **options)
    assert not workdir.exists()


@pytest.mark.slow
def test_a_run_extended_from_100_to_300_steps_is_bit_identical_to_a_run_of_300(
    workdir, tmp_path
):
    assert tiny.main(*tiny.training(workdir, train__num_steps=100)) == 0
    copy = tiny.trained(copy=tmp_path / "copy")
    assert_same(state_of(workdir), state_of(copy, step=100))
    assert tiny.main(*tiny.training(workdir)) == 0
    assert_same(state_of(workdir), state_of(tiny.trained()))


@pytest.mark.slow
def test_the_newest_checkpoints_and_every_hundredth_step_are_kept():
    assert steps(tiny.trained()) == [100, 200, 260, 280, 300]


@pytest.mark.slow
def test_scalars_and_images_are_written_for_tensorboard():
    import tensorflow as tf

    events = EventAccumulator(str(tiny.trained()), size_guidance={"tensors": 0})
    events.Reload()
    levels = [
        f"{name}/level_{t}" for name in ("f_pos", "f_neg", "displacement") for t in range(6)
    ]
    names = ["loss", "grad_norm", "learning_rate", "steps_per_second", "examples_per_second"]
    for tag in [*names, *levels]:
        found = events.Tensors(tag)
        assert [event.step for event in found] == [50, 100, 150, 200, 250, 300]
        assert all(np.isfinite(tf.make_ndarray(event.tensor_proto)) for event in found)
    (grid,) = events.Tensors("samples")
    assert grid.step == 150
    *_, png = tf.make_ndarray(grid.tensor_proto)
    file = np.asarray(Image.open(tiny.trained() / "grids" / "00000150.png"))
    np.testing.assert_array_equal(tf.io.decode_png(png).numpy()[..., 0], file)


@pytest.mark.slow
def test_a_folder_of_grids_that_cannot_be_made_is_one_clear_line(workdir, capsys):
    workdir.mkdir()
    (workdir / "grids").write_text("a file")
    steps = {"train__num_steps": 2, "log__sample_every_steps": 1}
    assert tiny.main(*tiny.training(workdir, **steps)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: cannot write to \S+/grids: File exists", line)


@pytest.mark.parametrize(("scale", "reported"), [(1, 0), (1e38, 1)])
def test_a_grid_of_samples_that_are_not_finite_is_reported(workdir, caplog, scale, reported):
    changes = {"mcmc__noise_scale": scale, "log__sample_every_steps": 1}  # only of samples
    tiny.main(*tiny.training(workdir, train__num_steps=2, **changes))
    assert (workdir / "grids" / "00000001.png").exists()
    line = "the samples after step 1 are not finite numbers: if later ones"
    assert caplog.text.count(line) == reported


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 1e3, 1e30])
def test_a_diverging_run_ends_with_an_error_of_one_line_and_saves_only_sound_states(
    workdir, capsys, rate
):
    changes = {"optim__learning_rate": rate, "optim__warmup_steps": 0, "optim__decay_steps": 0}
    changes |= {"checkpoint__every_steps": 1, "log__every_steps": 1000}
    assert tiny.main(*tiny.training(workdir, **changes)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"error: .*diverged at step (\d+): .*learning_rate.*mcmc\.K.*", line)
    diverged = int(found[1])
    assert 0 < diverged < tiny.STEPS
    # A state is saved once the next step has shown that it is sound.
    assert steps(workdir)[-3:] == list(range(1, diverged))[-3:]
    if diverged > 1:
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(state_of(workdir)))


@pytest.mark.parametrize(("decay_steps", "reported"), [(0, False), (9, True), (10, False)])
def test_a_learning_rate_that_is_zero_before_the_end_is_reported(decay_steps, reported, caplog):
    config = config_lib.default()
    config.optim.update(decay_steps=decay_steps, warmup_steps=2)
    config.train.num_steps = 10
    loop.warn_of_early_decay(config)
    pattern = "the learning rate is zero from step 9 on, so the rest of the 10 steps .*"
    assert [bool(re.match(pattern, line)) for line in caplog.messages] == [True] * reported


def make_metrics(**changes):
    values = {
        "loss": 0.1,
        "grad_norm": 1.0,
        "examples": [8.0, 0.0],
        "f_pos": [1.0, 0.0],
        "f_neg": [-2.0, 0.0],
        "displacement": [0.5, 0.0],
        "acceptance": [1.0, 0.0],
    }
    values |= changes
    return Metrics(**{name: np.asarray(value, np.float32) for name, value in values.items()})


def without_chain(**changes):
    none = {"f_neg": None, "displacement": None, "acceptance": None}
    return make_metrics(**changes)._replace(**none)


def test_metrics_within_the_limits_are_accepted():
    loop.raise_if_diverged(7, make_metrics(), LIMITS)
    loop.raise_if_diverged(7, make_metrics(loss=-99.0, f_neg=[-9e3, 9e3]), LIMITS)
    loop.raise_if_diverged(7, without_chain(), LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": np.nan},
        {"loss": 101.0},
        {"loss": -101.0},
        {"loss": -np.inf},
        {"grad_norm": np.inf},
        {"grad_norm": np.nan},
        {"f_pos": [2e4, 0], "f_neg": [2e4, 0]},  # these cancel in the loss
        {"f_neg": [0, -2e4]},
        {"f_pos": [np.nan, 0]},
        {"f_neg": [1.0, -np.inf]},
        {"loss": np.nan, "f_pos": [np.nan, np.nan], "f_neg": [np.nan, np.nan]},
    ],
)
def test_a_loss_energy_or_gradient_that_is_too_large_or_not_finite_is_an_error(changes):
    with pytest.raises(UserError, match=r"^[^\n]*diverged at step 7\b[^\n]*$"):
        loop.raise_if_diverged(7, make_metrics(**changes), LIMITS)


def test_without_limits_only_numbers_that_are_not_finite_are_errors():
    config = config_lib.default()
    config.train.loss_limit = config.train.energy_limit = float("inf")
    limits = loop.divergence_limits(config, 64)
    loop.raise_if_diverged(7, make_metrics(loss=1e30, f_neg=[1e30, 0]), limits)
    for changes in ({"loss": np.inf}, {"f_neg": [-np.inf, 0]}, {"f_pos": [np.nan, 0]}):
        with pytest.raises(UserError, match="diverged"):
            loop.raise_if_diverged(7, make_metrics(**changes), limits)


@pytest.mark.parametrize(
    ("objective", "dimension", "loss", "f"),
    [
        ("recovery", 2, 100.0, 1e4),  # points
        ("recovery", 8 * 8, 100.0, 1e4),  # digits
        ("recovery", 128 * 128 * 3, 76_800.0, 7.68e6),
        ("denoising", 8 * 8, 100.0, 1e4),
        ("denoising", 128 * 128 * 3, 100.0, 7.68e6),  # this loss is a mean over the pixels
    ],
)
def test_the_limits_grow_with_the_number_of_pixels(objective, dimension, loss, f):
    config = config_lib.default()
    config.train.objective = objective
    assert loop.divergence_limits(config, dimension) == (loss, f)


def quadratic_run(size, precision, num_steps):
    """Trains F = -p |y|² / 2 at the top level on white noise, and checks each step like `fit`.

    Args:
      size: height and width of the images [size, size, 3].
      precision: p before training. That of the data is 1.
      num_steps: number of steps.

    Returns:
      p after training, the largest |loss| and the largest mean |f|.
    """
    schedule = diffusion.schedule(6)
    step_size = recovery.step_sizes(schedule, 2e-4)
    energy = Energy(
        init=lambda key: ({"log_p": jnp.log(precision)}, {}),
        normalise=lambda params, vectors: (params, vectors),
        f=lambda params, x, t: (
            -(step_size[t] ** 2) * jnp.exp(params["log_p"]) * jnp.sum(x**2, (1, 2, 3)) / 2
        ),
        shape=(size, size, 3),
    )
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": step_size}, 10)
    method = Method(
        energy, schedule, Parameterisation(step_size**2, recovery.no_reference), sampler
    )
    training = train_step.Training(
        objective=train_step.recovery_gradient,
        draw_levels=lambda keys, schedule: jnp.full(len(keys), schedule.T - 1),
        optimiser=optax.adam(0.25),
        ema_decay=0.0,
    )
    mesh = sharding.make_mesh()
    step = train_step.compile_step(mesh, method, training)
    state = train_state.create_on(mesh, jax.random.key(0), energy, training.optimiser)
    limits = loop.divergence_limits(config_lib.default(), size * size * 3)
    losses, energies = [], []
    for k in range(num_steps):
        x = jax.random.normal(jax.random.key(k), (8, size, size, 3))
        state, metrics = step(state, {"image": x}, jax.random.key(1))
        metrics = jax.tree.map(np.asarray, metrics)
        loop.raise_if_diverged(k, metrics, limits)
        losses.append(abs(metrics.loss))
        energies.append(np.nanmax(np.abs(metrics.f_pos)))
    return float(np.exp(state.ema["log_p"])), max(losses), max(energies)


@pytest.mark.slow
def test_a_run_at_128_pixels_that_recovers_from_steep_energies_is_not_ended():
    """Its energy starts thirty times too steep, and ends within a factor of two of the data's.

    Fails if the limits are those of 8x8 images.
    """
    p, loss, f = quadratic_run(128, precision=30.0, num_steps=25)
    assert loss > LIMITS.loss
    assert f > LIMITS.f
    assert 0.5 < p < 2


def test_the_limits_of_a_run_are_those_of_its_images(workdir, monkeypatch):
    class StopError(Exception):
        pass

    def divergence_limits(config, dimension):
        raise StopError(dimension)

    monkeypatch.setattr(loop, "divergence_limits", divergence_limits)
    config = config_lib.load(str(tiny.DIGITS))
    config.data.image_size, config.energy.mult, config.energy.ch = 16, (1,), 8
    with pytest.raises(StopError) as stop:
        loop.train(config, sources.open_source(config), workdir)
    assert stop.value.args == (16 * 16,)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 128])
def test_a_run_whose_chains_diverge_is_ended_at_any_size(size):
    """With p = 400, s_t² at the top is twice the largest with which chains are stable."""
    with pytest.raises(UserError, match="diverged at step"):
        quadratic_run(size, precision=400.0, num_steps=5)


def test_the_mean_over_steps_is_that_of_all_examples():
    """Fails if every step has the same weight, or a step without examples counts as 0."""
    steps = [
        make_metrics(f_pos=[1.0, 0.0], examples=[6, 0]),
        make_metrics(f_pos=[5.0, 7.0], examples=[2, 1]),
        make_metrics(f_pos=[0.0, 3.0], examples=[0, 1]),
    ]
    np.testing.assert_allclose(loop.mean_of_groups(steps, "f_pos"), [2.0, 5.0])
    assert np.isnan(loop.mean_of_groups(steps[:1], "f_pos")[1])
    assert loop.mean_of_groups([without_chain()], "f_neg").size == 0


class Scalars:
    """Takes the place of a `MetricWriter` and keeps the scalars, by step."""

    def __init__(self):
        self.written = {}

    def write_scalars(self, step, scalars):
        self.written[step] = {name: float(value) for name, value in scalars.items()}


def progress_of(num_steps, metrics, first_step=0.0, start=0, **fields):
    """Reports a run whose first step takes `first_step` seconds, and the others none.

    Returns the scalars by step.
    """
    config = config_lib.default()
    config.diffusion.T, config.train.num_steps, config.train.batch_size = 2, num_steps, 8
    config.update_from_flattened_dict(fields)
    writer = Scalars()
    with loop.Progress(start, config, writer) as progress:
        time.sleep(first_step)
        for _ in range(start, num_steps):
            progress.add(metrics)
    return writer.written


@pytest.mark.parametrize(
    ("sampler", "metrics", "names"),
    [
        ("langevin", make_metrics(), {"f_pos", "f_neg", "displacement"}),
        ("hmc", make_metrics(), {"f_pos", "f_neg", "displacement", "acceptance"}),
        ("langevin", without_chain(), {"f_pos"}),
    ],
)
def test_scalars_are_those_of_the_sampler_and_of_groups_with_examples(sampler, metrics, names):
    """Fails if Langevin dynamics, which has no accept step, has an acceptance."""
    fields = {"mcmc.sampler": sampler, "log.every_steps": 2}
    written = progress_of(4, metrics, **fields)
    assert written.keys() == {2, 4}
    always = {"loss", "grad_norm", "learning_rate", "steps_per_second", "examples_per_second"}
    assert written[4].keys() == always | {f"{name}/level_0" for name in names}
    assert written[4]["examples_per_second"] == 8 * written[4]["steps_per_second"]


@pytest.mark.parametrize("adam", ["keras", "optax"])
def test_the_reported_learning_rate_is_that_of_the_last_update(adam):
    fields = {"optim.adam": adam, "optim.warmup_steps": 10, "optim.learning_rate": 1.0}
    written = progress_of(4, make_metrics(), **fields, **{"log.every_steps": 4})
    assert written[4]["learning_rate"] == pytest.approx(0.3 if adam == "keras" else 0.4)


def test_the_speed_and_the_time_that_is_left_do_not_include_the_first_step(caplog):
    caplog.set_level("INFO", logger="drl_jax")
    fields = {"log.every_steps": 2, "train.num_steps": 10_000}
    written = progress_of(4, make_metrics(), first_step=1.0, **fields)
    assert written[2]["steps_per_second"] > 100
    (first, *_) = caplog.messages
    assert re.fullmatch(
        r"step 2/10000  \d+\.\d steps/s  00:0\d:\d\d left  loss 0\.10000", first
    )


def test_lines_are_logged_between_reports_if_these_are_rare(caplog, monkeypatch):
    caplog.set_level("INFO", logger="drl_jax")
    progress_of(4, make_metrics())
    assert [line.split()[1] for line in caplog.messages] == ["4/4"]
    caplog.clear()
    monkeypatch.setattr(loop, "LOG_INTERVAL", -1.0)
    progress_of(4, make_metrics())
    assert [line.split()[1] for line in caplog.messages] == ["1/4", "2/4", "3/4", "4/4"]


def test_a_run_of_a_single_step_is_reported_without_a_speed(caplog):
    caplog.set_level("INFO", logger="drl_jax")
    (scalars,) = progress_of(4, make_metrics(), start=3).values()
    assert "steps_per_second" not in scalars
    assert caplog.messages == ["step 4/4  loss 0.10000"]


def test_a_run_begins_with_a_description(untrained, begun, workdir, caplog):
    _, config, _ = untrained
    begun(config, workdir)
    params = method_lib.from_config(config).energy.init(jax.random.key(0))[0]
    lines = [re.split(r"  +", line) for line in caplog.messages[:5]]
    assert lines == [
        ["devices", f"{jax.device_count()} x cpu"],
        ["data", "moons: 100,000 examples of shape 2"],
        [
            "network",
            f"mlp: {sum(a.size for a in jax.tree.leaves(params)):,} parameters, 1000 levels",
        ],
        ["steps", "300, of 16 examples each"],
        ["output", str(workdir)],
    ]
