import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import assert_same, state_of, steps, wait_until
from ml_collections import ConfigDict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax.errors import Interrupted, UserError
from drl_jax.runtime import preemption
from drl_jax.training import loop
from drl_jax.training.step import Metrics

LIMITS = ConfigDict({"loss_limit": 100.0, "energy_limit": 1e4})


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "run"


# --- one run in five starts, and what is to be seen of it ---


class Story(NamedTuple):
    """What was seen of a run that was ended four times before it ended by itself."""

    workdir: epath.Path
    terminal: str  # all that the second start wrote, on a terminal
    logs: list[str]  # all that each of the others wrote, to a pipe
    stopped: list[tuple[int, float]]  # status, and seconds it took, after each SIGTERM
    compiled: set[str]  # programs that were not in the cache


def compiled():
    return {path.name for path in tiny.COMPILED.iterdir()}


def stop(process):
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60), time.monotonic() - begun


def on_a_terminal(args, until):
    """Runs the program on a terminal, where something else logs, until it is stopped."""
    chatter = """
import logging, sys, threading, time
def talk():
    while True:
        logging.getLogger("drl_jax.other").warning("a line of its own")
        time.sleep(0.05)
threading.Thread(target=talk, daemon=True).start()
from drl_jax import main
sys.exit(main.main(sys.argv))
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    written = []

    def read():
        try:
            while chunk := os.read(ours, 4096):
                written.append(chunk)
        except OSError:  # the terminal has been closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen(
        [sys.executable, "-c", chatter, *args],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        wait_until(until, process)
        stopped = stop(process)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)
    return b"".join(written).decode(), stopped


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    tiny.trained()  # compiles every program
    found = compiled()
    folder = tmp_path_factory.mktemp("story")
    workdir = epath.Path(folder) / "run"
    args = tiny.training(workdir)
    logs, stopped = [], []

    def names():
        written = workdir / "checkpoints"
        return {path.name for path in written.iterdir()} if written.exists() else set()

    def in_the_midst_of_a_write():
        return any("tmp" in name for name in names())

    def newly_written():
        before = {name for name in names() if name.isdecimal()}
        return lambda: {name for name in names() if name.isdecimal()} - before

    def run(until, end):
        with (folder / f"log_{len(logs)}").open("w+") as log:
            process = tiny.start(*args, stdout=log, stderr=log)
            try:
                wait_until(until, process)
                end(process)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            logs.append(log.read())

    run(in_the_midst_of_a_write, subprocess.Popen.kill)
    terminal, status = on_a_terminal(args, newly_written())
    stopped.append(status)
    run(newly_written(), subprocess.Popen.kill)
    run(newly_written(), lambda process: stopped.append(stop(process)))
    run(lambda: True, lambda process: process.wait(timeout=300))
    return Story(workdir, terminal, logs, stopped, compiled() - found)


@pytest.mark.slow
def test_a_run_killed_and_stopped_again_and_again_ends_in_the_same_bits(story):
    assert_same(state_of(story.workdir), state_of(tiny.trained()))
    for name in ("metrics.json", "samples.png"):
        assert (story.workdir / name).read_bytes() == (tiny.trained() / name).read_bytes()
    assert [
        path.name for path in (story.workdir / "checkpoints").iterdir() if "." in path.name
    ] == []


@pytest.mark.slow
def test_sigterm_saves_and_ends_within_seconds_with_status_143(story):
    for text, (status, seconds) in zip(
        (story.terminal, story.logs[2]), story.stopped, strict=True
    ):
        assert status == 143
        assert seconds < 10
        assert re.search(
            r"^stopped by signal 15; step \d+ is saved: the same command goes on from here\r?$",
            text,
            re.MULTILINE,
        )
    went_on = [re.search(r"going on from step (\d+) of 300", log) for log in story.logs]
    assert went_on[0] is None
    starts = [int(found[1]) for found in went_on[1:]]
    assert starts == sorted(set(starts))
    saved = [
        re.search(r"step (\d+) is saved", text)[1] for text in (story.terminal, story.logs[2])
    ]
    assert [int(step) for step in saved] == [starts[0], starts[2]]  # each went on from there


@pytest.mark.slow
def test_a_terminal_shows_a_bar_that_no_line_of_log_tears(story):
    bars = re.findall(
        r"(\d+)/300 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, loss=-?\d+\.\d{4}\]", story.terminal
    )
    assert len(set(bars)) > 2
    shown = [
        line.rpartition("\r")[2] for line in story.terminal.replace("\r\n", "\n").split("\n")
    ]
    assert shown.count("a line of its own") > 5
    others = {line for line in shown if "a line of its own" in line} - {"a line of its own"}
    assert not others
    assert "step 50/300" not in story.terminal  # that is for logs


@pytest.mark.slow
def test_a_log_has_plain_lines_and_no_noise(story):
    known = [
        r"going on from step \d+ of 300",
        r"step \d+/300  [\d.]+ steps/s  \d\d:\d\d:\d\d left  loss -?\d\.\d{5}",
        r"stopped by signal 15; step \d+ is saved: .*",
        r"pixel Fréchet distance .*",
        r"samples\.png and metrics\.json are in .*",
    ]
    for log in story.logs:
        for line in log.splitlines():
            assert any(re.fullmatch(pattern, line) for pattern in known), line
    assert "step 300/300" in story.logs[-1]


@pytest.mark.slow
def test_starts_find_the_programs_that_an_earlier_one_compiled(story):
    assert any(name.startswith("jit_step-") for name in compiled())
    again = {name for name in story.compiled if name.startswith(("jit_step-", "jit_program-"))}
    assert not again


# --- the rest, in this process ---


def test_a_checkpoint_holds_its_step_and_more_steps_may_be_asked_for(workdir, tmp_path):
    assert tiny.main(*tiny.training(workdir, train__num_steps=100)) == 0
    copy = tiny.trained(copy=tmp_path / "copy")
    assert_same(state_of(workdir), state_of(copy, step=100))
    assert tiny.main(*tiny.training(workdir)) == 0
    assert_same(state_of(workdir), state_of(tiny.trained()))


def test_the_last_checkpoints_are_kept_and_every_nth():
    assert steps(tiny.trained()) == [100, 200, 260, 280, 300]


def test_scalars_and_images_are_written_for_tensorboard():
    import tensorflow as tf

    events = EventAccumulator(str(tiny.trained()), size_guidance={"tensors": 0})
    events.Reload()
    levels = [
        f"{name}/level_{t}" for name in ("f_pos", "f_neg", "displacement") for t in range(6)
    ]
    for tag in ["loss", "grad_norm", "steps_per_second", *levels]:
        found = events.Tensors(tag)
        assert [event.step for event in found] == [50, 100, 150, 200, 250, 300]
        assert all(np.isfinite(tf.make_ndarray(event.tensor_proto)) for event in found)
    (grid,) = events.Tensors("samples")
    assert grid.step == 150
    *_, png = tf.make_ndarray(grid.tensor_proto)
    file = np.asarray(Image.open(tiny.trained() / "grids" / "00000150.png"))
    np.testing.assert_array_equal(tf.io.decode_png(png).numpy()[..., 0], file)


@pytest.mark.parametrize("rate", [1.0, 1e3, 1e30])
def test_a_run_that_diverges_ends_with_one_line_and_keeps_only_sound_states(
    workdir, capsys, caplog, rate
):
    changes = {"optim__learning_rate": rate, "optim__warmup_steps": 0, "optim__decay_steps": 0}
    changes |= {"checkpoint__every_steps": 1, "log__every_steps": 1000}
    assert tiny.main(*tiny.training(workdir, **changes)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"error: training diverged at step (\d+): .*learning_rate.*mcmc\.K.*", line
    )
    bad = int(found[1])
    assert 0 < bad < tiny.STEPS
    # Every state before the bad one was tried by the step after it, and saved; that one not.
    assert steps(workdir)[-3:] == list(range(1, bad))[-3:]
    if bad > 1:
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(state_of(workdir)))


def make_metrics(**changes):
    nan = np.float32(np.nan)  # level 1 met no example
    values = {
        "loss": 0.1,
        "grad_norm": 1.0,
        "f_pos": [1.0, nan],
        "f_neg": [-2.0, nan],
        "displacement": [0.5, nan],
        "acceptance": [1.0, nan],
    }
    values |= changes
    return Metrics(**{name: np.asarray(value, np.float32) for name, value in values.items()})


def test_metrics_within_the_limits_are_sound():
    loop.require_sound(7, make_metrics(), LIMITS)
    loop.require_sound(7, make_metrics(loss=-99.0, f_neg=[-9e3, 9e3]), LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": np.nan},
        {"loss": 101.0},
        {"loss": -101.0},
        {"loss": -np.inf},
        {"grad_norm": np.inf},
        {"grad_norm": np.nan},
        {"f_pos": [2e4, np.nan], "f_neg": [2e4, np.nan]},  # which the loss does not show
        {"f_neg": [np.nan, -2e4]},
        {"f_neg": [1.0, -np.inf]},
        {"loss": np.nan, "f_pos": [np.nan, np.nan], "f_neg": [np.nan, np.nan]},
    ],
)
def test_an_exploding_or_unreal_loss_energy_or_gradient_is_refused(changes):
    with pytest.raises(UserError, match=r"diverged at step 7: [^\n]*$"):
        loop.require_sound(7, make_metrics(**changes), LIMITS)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_held_and_handed_back(signum):
    before = signal.getsignal(signum)
    with preemption.stop_on_signal() as stop:
        assert stop() is None
        os.kill(os.getpid(), signum)
        wait = time.monotonic() + 10
        while not stop() and time.monotonic() < wait:
            time.sleep(0.001)
        assert stop() == signum
    assert signal.getsignal(signum) is before
    assert str(Interrupted(15, 3)) == "stopped by signal 15; step 3 is saved"


def test_the_mean_over_steps_leaves_out_what_is_nan():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(loop.nan_mean(values), [2.0, 5.0, np.nan])
