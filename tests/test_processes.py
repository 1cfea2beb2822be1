"""Compares two processes of four devices each, on one machine, with one process."""

import contextlib
import http.server
import importlib.machinery
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import assert_same, state_of, steps, wait_until

from drl_jax.errors import Interrupted, UserError
from drl_jax.runtime import processes

TIMEOUT = 10  # --timeout in these tests [seconds]
SHORT = {
    "train__num_steps": 5,
    "log__every_steps": 5,
    "log__sample_every_steps": 2,
    "checkpoint__every_steps": 2,
    "evaluation__num_samples": 20,
}


def start(*args, devices=1):
    """Starts the program with a number of CPU devices."""
    with pytest.MonkeyPatch.context() as patch:
        flags = f"--xla_force_host_platform_device_count={devices} {tiny.COMPILE_FAST}"
        patch.setenv("XLA_FLAGS", flags)
        return tiny.start(*args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def start_pair(args, args_of_second=None):
    """Starts the program as two processes with four devices each."""
    job = [f"--coordinator_address=localhost:{free_port()}", f"--timeout={TIMEOUT}"]
    return [
        start(*each, *job, "--num_processes=2", f"--process_id={i}", devices=4)
        for i, each in enumerate((args, args_of_second or args))
    ]


def ended(*started):
    """Waits for the processes, and returns their exit statuses and outputs."""
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], outputs


# Gloo, which connects the processes, writes "[Gloo] Rank 0 is connected to 1 peer ranks.
# Expected number of connected peer ranks is : 1", word by word from several threads. So its
# words can be in any order, on a line of their own or before a line of the program.
GLOO = re.compile(
    r"(\[Gloo\]|Rank|is|connected(?! as)|to|peer|ranks\.?|Expected|number|of|:|\d+|\s)*"
)


def own_lines(output):
    """Returns the lines of an output that neither Gloo nor `connected` wrote."""
    lines = (line[GLOO.match(line).end() :] for line in output.splitlines())
    known = "waiting up to", "connected as process"
    return [line for line in lines if line and not line.startswith(known)]


def test_words_of_gloo_are_recognised_in_any_order_and_before_other_lines():
    output = (
        "waiting up to --timeout=10 seconds\n"
        "[Gloo] Rank 1 is connected to 1 peer ranks. [Gloo] Rank 1 is connected to \n"
        "1 peer ranks. Expected number of connected peer ranks is : 1\n"
        "Expected number of connected peer ranks is : 1\n\n"
        "ranks is : 1connected as process 1 of 2\n"
        "[Gloo] Rank step 1/5\n"
        "error: rank 1 stopped\n"
    )
    assert own_lines(output) == ["step 1/5", "error: rank 1 stopped"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The work directory of a run of two processes, and their outputs."""
    workdir = epath.Path(tmp_path_factory.mktemp("pair") / "run")
    statuses, outputs = ended(*start_pair(tiny.training(workdir, **SHORT)))
    assert statuses == [0, 0], outputs
    return workdir, outputs


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(pair, tmp_path):
    """On 2 x 4 devices and on one."""
    workdir, _ = pair
    alone = epath.Path(tmp_path) / "run"
    (status,), (output,) = ended(start(*tiny.training(alone, **SHORT)))
    assert status == 0, output
    state, wanted = state_of(workdir), state_of(alone)
    assert state.step == wanted.step == 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state, wanted
    )
    found, expected = (
        json.loads((run / "metrics.json").read_text()) for run in (workdir, alone)
    )
    assert found["pixel_frechet"] == pytest.approx(expected["pixel_frechet"], rel=1e-3)


@pytest.mark.slow
def test_every_process_logs_that_it_is_connected(pair):
    _, outputs = pair
    for i, output in enumerate(outputs):
        assert f"process {i} of 2" in output
        assert f"--timeout={TIMEOUT}" in output


@pytest.mark.slow
def test_only_the_first_process_logs_and_writes(pair):
    workdir, (first, second) = pair
    assert "step 5/5" in first
    assert "metrics.json" in first
    assert own_lines(second) == []
    names = {path.name for path in workdir.iterdir()}
    (events,) = (name for name in names if name.startswith("events"))
    written = ("config", "data", "metrics", "settings")
    files = {*(f"{name}.json" for name in written), "log.txt", "samples.png"}
    assert names == {events, "checkpoints", "grids", *files}
    assert steps(workdir) == [2, 4, 5]


@pytest.mark.slow
def test_one_process_or_two_draw_the_same_samples(pair):
    workdir, _ = pair
    args = "--mode=sample", f"--workdir={workdir}", "--num_samples=10"
    folder = workdir / "samples" / "step_5_seed_0"
    found = []
    for begin in (start_pair, lambda args: [start(*args, devices=8)]):
        statuses, outputs = ended(*begin(args))
        assert set(statuses) == {0}, outputs
        found.append(np.load(folder / "samples.npy"))
        assert len(list(folder.iterdir())) == 13
        folder.rmtree()
    np.testing.assert_allclose(*found, atol=1e-4)


LONG = SHORT | {"train__num_steps": 100_000, "log__sample_every_steps": 100_000}


@pytest.mark.slow
def test_a_resumed_pair_ends_in_the_state_of_an_uninterrupted_one(pair, tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    shutil.copytree(pair[0], workdir)
    for step in (4, 5):
        (workdir / "checkpoints" / str(step)).rmtree()
    statuses, outputs = ended(*start_pair(tiny.training(workdir, **SHORT)))
    assert statuses == [0, 0], outputs
    assert "step 2 of 5" in outputs[0]
    assert_same(state_of(workdir), state_of(pair[0]))


@pytest.mark.slow
def test_a_signal_to_the_second_process_saves_a_checkpoint_and_stops_both(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    pair = start_pair(tiny.training(workdir, **LONG))
    wait_until(lambda: (workdir / "checkpoints" / "2").exists(), pair[0])
    pair[1].send_signal(signal.SIGTERM)
    statuses, outputs = ended(*pair)
    assert statuses == [143, 143], outputs
    *_, newest = steps(workdir)
    assert newest >= 2
    assert f"step {newest} is saved" in outputs[0]


@pytest.mark.slow
def test_a_run_of_one_device_can_be_finished_on_four(tmp_path):
    """Batches and noise are the same: equal to 1e-5 of the largest entry of each array."""
    changes = SHORT | {
        "train__num_steps": tiny.STEPS + 5,
        "log__sample_every_steps": 1000,
        "checkpoint__every_steps": 1000,
    }
    on_one, on_four = (tiny.trained(tmp_path / name) for name in ("one", "four"))
    assert tiny.main(*tiny.training(on_one, **changes)) == 0
    statuses, outputs = ended(start(*tiny.training(on_four, **changes), devices=4))
    assert statuses == [0], outputs
    state, wanted = state_of(on_four), state_of(on_one)
    assert state.step == wanted.step == tiny.STEPS + 5
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "signum"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_other_and_the_same_command_resumes(tmp_path, lost, signum):
    workdir = epath.Path(tmp_path) / "run"
    pair = start_pair(tiny.training(workdir, **LONG))
    wait_until(lambda: (workdir / "checkpoints" / "2").exists(), pair[0])
    pair[lost].send_signal(signum)
    before = time.monotonic()
    (status,), (output,) = ended(pair[1 - lost])
    took = time.monotonic() - before
    pair[lost].kill()
    pair[lost].communicate()
    assert status != 0
    assert took < 2 * TIMEOUT
    # JAX's runtime aborts the process, unless a collective operation fails in Python first.
    assert "another task died" in output or "JAX failed" in output
    assert "the same command resumes" in output
    if lost == 1:  # the first process writes the checkpoints
        return
    *_, newest = steps(workdir)
    num_steps = newest + 2
    args = tiny.training(workdir, **LONG | {"train__num_steps": num_steps})
    statuses, outputs = ended(*start_pair(args))
    assert statuses == [0, 0], outputs
    assert f"step {newest} of {num_steps}" in outputs[0]
    assert state_of(workdir).step == num_steps


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_collective_operation_that_fails_is_one_line(monkeypatch, kind):
    """An error that Python raises before JAX's runtime ends the process."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    with pytest.raises(UserError) as error, processes.connected(job(distributed=True)):
        raise kind("UNKNOWN: Gloo AllGather failed\nRPC: /xla")
    assert re.fullmatch(r"[^\n]*UNKNOWN: Gloo AllGather failed[^\n]*", str(error.value))


@pytest.mark.parametrize(("signum", "waits"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_processes_that_are_all_stopped_by_a_signal_wait_for_each_other(
    monkeypatch, signum, waits
):
    """Otherwise, the end of one looks like a lost process to another that is still writing."""
    shutdowns = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: shutdowns.append(signum))
    with pytest.raises(Interrupted), processes.connected(job(distributed=True)):
        raise Interrupted(signum, "all is saved")
    assert len(shutdowns) == waits


@pytest.mark.parametrize("kind", [KeyError, ValueError])
def test_an_error_that_is_not_of_jax_keeps_its_type(monkeypatch, kind):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    with pytest.raises(kind), processes.connected(job(distributed=True)):
        raise kind("a")


@pytest.mark.slow
def test_different_settings_are_an_error_in_all_processes(tmp_path):
    args, others = (
        tiny.training(tmp_path / "run", optim__learning_rate=rate) for rate in (1e-3, 2e-3)
    )
    statuses, outputs = ended(*start_pair(args, others))
    assert statuses == [1, 1]
    (first,), (second,) = map(own_lines, outputs)
    assert re.fullmatch(r"error: .*--process_id 1\b.*", first)
    assert re.fullmatch(r"error: process 1 .*optim\.learning_rate .*0\.002.* 0\.001.*", second)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_one_line(tmp_path):
    address = f"localhost:{free_port()}"
    flags = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=1"]
    before = time.monotonic()
    (status,), (output,) = ended(
        start(*tiny.training(tmp_path / "run"), *flags, f"--timeout={TIMEOUT}")
    )
    assert status == 1
    assert time.monotonic() - before < 3 * TIMEOUT
    (line,) = own_lines(output)
    assert re.fullmatch(
        rf"error: --coordinator_address={address} .* {TIMEOUT} seconds .*--process_id=0.*", line
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_come_end_the_first(tmp_path):
    flags = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    before = time.monotonic()
    (status,), (output,) = ended(
        start(
            *tiny.training(tmp_path / "run"), *flags, "--process_id=0", f"--timeout={TIMEOUT}"
        )
    )
    assert status != 0
    assert time.monotonic() - before < 3 * TIMEOUT
    assert f"--timeout={TIMEOUT} seconds for all 2 processes" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_processes=2"], ["--coordinator_address", "--process_id", "missing"]),
        (
            ["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
            ["--process_id=2", "--num_processes=2"],
        ),
        (
            ["--coordinator_address=a", "--num_processes=2", "--process_id=0"],
            ["--coordinator_address=a ", "HOST:PORT"],
        ),
        (
            [
                "--nodistributed",
                "--coordinator_address=a:1",
                "--num_processes=2",
                "--process_id=0",
            ],
            ["--nodistributed", "--coordinator_address=a:1"],
        ),
        (["--num_processes=0"], ["num_processes", "0"]),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(tmp_path, capsys, flags, words):
    assert tiny.main(*tiny.training(tmp_path / "run"), *flags) == 1
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", stderr)
    assert all(word in stderr for word in words), stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_workdir(capsys):
    flags = ["--coordinator_address=a:1", "--num_processes=2", "--process_id=0"]
    assert tiny.main(f"--config={tiny.DIGITS}", *flags) == 1
    assert re.fullmatch(r"error: [^\n]*--workdir[^\n]*\n", capsys.readouterr().err)


def job(**changes):
    values = dict.fromkeys(processes.Job._fields) | {"timeout": TIMEOUT} | changes
    return processes.Job(**values)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # the batch script itself, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        # an interactive step of a job of several tasks
        (
            {
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_NODELIST": "node1",
            },
            False,
        ),
        (
            {
                "SLURM_NTASKS": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "node1",
            },
            True,
        ),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_slurm_and_tpu_pods_are_detected_and_flags_override_them(
    monkeypatch, variables, several
):
    slurm = "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"
    for name in (*slurm, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert job().has_others is several
    assert job(distributed=False).has_others is False
    assert job(distributed=True).has_others is True


def test_jax_waits_for_the_tasks_of_the_slurm_step(monkeypatch, caplog):
    """By itself, JAX waits for those of the whole job. A flag comes first."""
    caplog.set_level("INFO", logger="drl_jax")
    settings = {}
    monkeypatch.setattr(jax.distributed, "initialize", settings.update)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    with processes.connected(job(num_processes=3)):
        pass
    assert settings["num_processes"] == 3
    caplog.clear()
    with processes.connected(job()):
        pass
    assert settings["num_processes"] == 2
    assert re.search("for all 2 processes .*--nodistributed", caplog.messages[0])


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), "plugin for it is not installed"),
        (RuntimeError("Unable to initialize\nbackend"), "Unable to initialize"),
    ],
)
def test_a_platform_that_jax_cannot_use_is_one_line(monkeypatch, distributed, error, words):
    def devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    pattern = rf"^JAX_PLATFORMS=cuda cannot be used \([^\n]*{words}\): [^\n]*$"
    with (
        pytest.raises(UserError, match=pattern),
        processes.connected(job(distributed=distributed)),
    ):
        pass


@pytest.mark.parametrize(
    ("workers", "several"),
    [(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", True), (b"::10.0.0.2", False)],
)
def test_the_metadata_server_of_a_cloud_tpu_lists_its_hosts(monkeypatch, workers, several):
    """It is queried only where libtpu is installed."""
    requests = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(workers)

    for name in ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        for installed in (True, False):
            found = importlib.machinery.ModuleSpec("libtpu", None) if installed else None
            monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
            assert job().has_others is (several and installed)
        server.shutdown()
    attribute = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    assert requests == [(attribute, "Google")]


def test_outside_a_cluster_a_process_needs_flags(tmp_path):
    (status,), (output,) = ended(start(*tiny.training(tmp_path / "run"), "--distributed"))
    assert status == 1
    (line,) = own_lines(output)
    assert re.fullmatch(r"error: .*--coordinator_address.*--nodistributed.*", line)
    assert not (tmp_path / "run").exists()
