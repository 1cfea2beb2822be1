"""Runs the launch scripts with stand-ins for gcloud, Slurm and nvidia-smi first on PATH."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
from etils import epath
from helpers import tiny
from helpers.runs import steps, wait_until

from drl_jax.tasks import command_line

pytestmark = pytest.mark.infrastructure

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
POD = ("run", "--zone=z", "--type=v4-32", "--poll=0")
PROGRAM = ("--config=configs/digits.py", "--workdir=gs://bucket/a run")
WHERE = ["--quiet", "--zone=z"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A function that writes a Python program into the first folder of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def write(name, *lines):
        _executable(folder / name, f"#!{sys.executable}", "import sys, os, json", *lines)

    return write


def _executable(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o755)


def launch(script, *args, **kwargs):
    """Runs a script to its end, and returns the completed process."""
    return subprocess.run(
        ["bash", LAUNCH / script, *args], capture_output=True, text=True, timeout=60, **kwargs
    )


def recorded(file):
    """Returns the calls that a stand-in has written, one JSON list per line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_shellcheck_passes():
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "shellcheck not found: install the test extra"
    assert len(SCRIPTS) >= 7
    subprocess.run([shellcheck, *SCRIPTS], check=True)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm_gpu.sh", "gpu_box.sh", "test.sh"])
def test_help_is_the_comment_at_the_top(script):
    ended = launch(script, "--help")
    assert ended.returncode == 0
    assert f"launch/{script}" in ended.stdout
    assert "#" not in ended.stdout.splitlines()[0]
    assert "set -euo" not in ended.stdout


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("tpu_pod.sh", [], "give run, logs or down"),
        ("tpu_pod.sh", ["up"], "'up': give run, logs or down"),
        ("tpu_pod.sh", ["run", "--type=v4-8", "--", *PROGRAM], "no --zone"),
        ("tpu_pod.sh", ["run", "--zone=z", "--", *PROGRAM], "no --type"),
        ("tpu_pod.sh", ["run", "--zone=z", "--type=v9-8", "--", *PROGRAM], "--type=v9-8"),
        ("tpu_pod.sh", [*POD, "--sopt", "--", *PROGRAM], "'--sopt' of run"),
        ("tpu_pod.sh", [*POD, "--", "--workdir=runs/a"], "'runs/a': give a bucket"),
        ("tpu_pod.sh", [*POD, "--", "--config=configs/digits.py"], "'': give a bucket"),
        ("tpu_pod.sh", [*POD], "give a bucket"),
        ("tpu_host.sh", ["stop"], "'stop': give install, start"),
        ("slurm_gpu.sh", ["--config=configs/digits.py"], "no --workdir"),
        ("slurm_gpu.sh", ["--workdir=/shared/a"], "not in a Slurm job"),
        ("slurm_gpu.sh", ["--workdir=/a", "train"], "unexpected argument 'train'"),
        ("gpu_box.sh", [], "nothing to run"),
        ("gpu_box.sh", ["--mode=sample", "here"], "unexpected argument 'here'"),
    ],
)
def test_a_mistake_is_reported_in_one_line(script, args, words):
    ended = launch(script, *args)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert re.fullmatch(r"error: [^\n]*\n", ended.stderr)
    assert words in ended.stderr


# ---- tpu_pod.sh


def tpu(*args):
    return ["gcloud", "compute", "tpus", *args]


def ssh(worker, command):
    return tpu("tpu-vm", "ssh", "drl-jax", *WHERE, f"--worker={worker}", f"--command={command}")


HOST = "bash drl_jax/launch/tpu_host.sh"
UNPACK = f"mkdir -p drl_jax && tar -xzf drl_jax.tgz -C drl_jax && {HOST} install"
START = f"{HOST} start --config=configs/digits.py --workdir=gs://bucket/a\\ run"
DESCRIBE = tpu("queued-resources", "describe", "drl-jax", *WHERE, "--format=value(state.state)")
DELETE = tpu("queued-resources", "delete", "drl-jax", *WHERE, "--force")
SCP = tpu("tpu-vm", "scp", "drl_jax.tgz", "drl-jax:", *WHERE, "--worker=all")
CREATE = [
    *tpu("queued-resources", "create", "drl-jax", *WHERE, "--node-id=drl-jax"),
    "--accelerator-type=v4-32",
    "--runtime-version=tpu-ubuntu2204-base",
]
WATCHED = [ssh(0, f"{HOST} follow"), ssh(0, f"{HOST} status")]
STARTED = [SCP, ssh("all", UNPACK), ssh("all", START), *WATCHED]


def without_scratch(call):
    """Returns a call without the path of the script's temporary folder."""
    return [re.sub(r"^/.*/(drl_jax\.tgz)$", r"\1", word) for word in call]


def test_a_dry_run_on_a_tpu_prints_the_commands(stand_ins):
    stand_ins("gcloud", "sys.exit('called')")
    ended = launch("tpu_pod.sh", *POD, "--dry-run", "--", *PROGRAM)
    assert ended.returncode == 0, ended.stderr
    pack, *rest = (without_scratch(shlex.split(line)) for line in ended.stdout.splitlines())
    archive = ["tar", "-czf", "drl_jax.tgz", "--exclude=__pycache__"]
    assert pack == [
        *archive,
        "drl_jax",
        "configs",
        "launch",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ]
    assert rest == [DESCRIBE, CREATE, *STARTED, DELETE]


@pytest.mark.parametrize(
    ("command", "expected"), [("logs", WATCHED[:1]), ("down", [DELETE])], ids=["logs", "down"]
)
def test_a_dry_run_of_the_other_commands(command, expected):
    ended = launch("tpu_pod.sh", command, "--zone=z", "--dry-run")
    assert [shlex.split(line) for line in ended.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_type_determines_the_runtime_and_all_options_are_used(kind, runtime):
    options = ["--zone=z", f"--type={kind}", "--name=mine", "--project=p", "--spot", "--keep"]
    ended = launch("tpu_pod.sh", "run", *options, "--dry-run", "--", "--workdir=gs://b/r")
    create = (
        "gcloud compute tpus queued-resources create mine --quiet --project=p --zone=z "
        f"--node-id=mine --accelerator-type={kind} --runtime-version={runtime} --spot"
    )
    lines = ended.stdout.splitlines()
    assert create in lines
    assert all(" mine" in line and "--project=p" in line for line in lines[1:])
    assert "delete" not in ended.stdout


@pytest.fixture
def cloud(stand_ins, tmp_path):
    """A function that runs tpu_pod.sh with a simulation of Cloud TPU.

    A requested TPU is first queued, then provisioned, then active. `events` has one entry for
    each time that the program's log is followed: the status that the program then has, or, as
    a string, the state of a TPU whose connection is lost.
    """
    calls, state = tmp_path / "calls", tmp_path / "state"
    stand_ins(
        "gcloud",
        f"calls, state = open({str(calls)!r}, 'a'), {str(state)!r}",
        "print(json.dumps(['gcloud', *sys.argv[1:]]), file=calls)",
        "now = json.load(open(state))",
        "command = ' '.join(sys.argv[1:])",
        "status = 0",
        "if ' describe ' in command:",
        "    if not now['states']:",
        "        sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')",
        "    print(now['states'][0])",
        "    del now['states'][: len(now['states']) > 1]",
        "elif ' create ' in command:",
        "    now['states'] = ['WAITING_FOR_RESOURCES', 'PROVISIONING', *now['granted']]",
        "elif ' delete ' in command:",
        "    now['states'] = []",
        "elif now['states'] != ['ACTIVE']:",
        "    status = 1",
        "elif command.endswith(' follow'):",
        "    print('step 1/2')",
        "    if not isinstance(now['events'][0], int):",
        "        status, now['states'] = 255, [now['events'].pop(0)]",
        "elif command.endswith(' status'):",
        "    print(now['events'].pop(0))",
        "json.dump(now, open(state, 'w'))",
        "sys.exit(status)",
    )

    def run(events, *options, existing=(), granted=("ACTIVE",)):
        state.write_text(
            json.dumps({"states": list(existing), "events": events, "granted": list(granted)})
        )
        ended = launch("tpu_pod.sh", *POD, *options, "--", *PROGRAM)
        return ended, [without_scratch(call) for call in recorded(calls)]

    return run


def test_a_tpu_is_requested_used_and_deleted(cloud):
    ended, calls = cloud([0])
    assert ended.returncode == 0
    assert ended.stdout == "step 1/2\n"
    assert calls == [DESCRIBE, CREATE, *[DESCRIBE] * 3, *STARTED, DELETE]


def test_a_preempted_tpu_is_requested_again_and_the_program_resumes(cloud):
    """A lost connection to a TPU that is still active starts nothing."""
    ended, calls = cloud(["SUSPENDED", "ACTIVE", "running", 0])
    assert ended.returncode == 0
    assert [call for call in calls if call != DESCRIBE] == [
        *(CREATE, *STARTED, DELETE),  # SUSPENDED
        *(CREATE, *STARTED, *WATCHED, DELETE),  # connection lost, then the end of the program
    ]


def test_an_existing_tpu_is_used_and_can_be_kept(cloud):
    ended, calls = cloud([0], "--keep", existing=["ACTIVE"])
    assert ended.returncode == 0
    assert calls == [DESCRIBE, *STARTED]


def test_a_program_that_ends_with_an_error_is_not_started_again(cloud):
    ended, calls = cloud([1])
    assert ended.returncode == 1
    assert calls.count(ssh("all", START)) == 1
    assert calls[-1] == DELETE


@pytest.mark.parametrize("status", [143, 130, 134, 137])
def test_a_program_that_was_killed_is_started_again(cloud, status):
    ended, calls = cloud([status, status, 0])
    assert ended.returncode == 0
    assert calls.count(CREATE) == 1
    assert calls.count(ssh("all", START)) == 3


def test_a_program_that_is_killed_three_times_is_not_started_again(cloud):
    ended, calls = cloud([134, 134, 134, 0])
    assert ended.returncode == 134
    assert calls.count(ssh("all", START)) == 3
    assert calls[-1] == DELETE


def test_a_request_that_fails_is_not_repeated(cloud):
    ended, calls = cloud([], granted=["FAILED"])
    assert ended.returncode == 1
    assert "the request for v4-32 failed" in ended.stderr
    assert calls.count(CREATE) == 1


def test_without_the_tpus_state_no_tpu_is_requested(stand_ins, tmp_path):
    calls = tmp_path / "calls"
    stand_ins(
        "gcloud",
        f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))",
        "sys.exit('ERROR: no credentials')",
    )
    ended = launch("tpu_pod.sh", *POD, "--", *PROGRAM)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: [^\n]* drl-jax: ERROR: no credentials\n", ended.stderr)
    assert [["gcloud", *call] for call in recorded(calls)] == [DESCRIBE] * 5


def test_without_gcloud_the_error_says_so(monkeypatch, tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = launch("tpu_pod.sh", *POD, "--", *PROGRAM)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: gcloud not found[^\n]*\n", ended.stderr)


# ---- tpu_host.sh

SAVING = 3  # time that the program needs to save [seconds]


@pytest.fixture
def host(tmp_path):
    """A function that runs tpu_host.sh in a project with a stand-in for Python.

    The stand-in prints its arguments, the last two of which are the time for which it runs and
    its exit status. SIGTERM ends it, `SAVING` seconds later.
    """
    root = tmp_path / "host"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").symlink_to(LAUNCH)
    _executable(
        root / ".venv" / "bin" / "python",
        f"#!{sys.executable}",
        "import signal, sys, time",
        "def end(*_):",
        f"    time.sleep({SAVING})",
        "    sys.exit(143)",
        "signal.signal(signal.SIGTERM, end)",
        "print(*sys.argv[1:], sep='|', flush=True)",
        "seconds, status = sys.argv[-2:]",
        "time.sleep(float(seconds))",
        "sys.exit(int(status))",
    )

    def call(*args):
        return subprocess.run(
            ["bash", root / "launch" / "tpu_host.sh", *args],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start_and_wait(*args):
        assert call("start", *args).returncode == 0
        while not call.log.read_text():
            time.sleep(0.01)

    call.log, call.pid, call.start = root / "job.log", root / "job.pid", start_and_wait
    return call


@pytest.mark.parametrize("status", ["0", "1", "134"])
def test_a_host_keeps_the_log_and_the_status_of_the_program(host, status):
    host.start("a b", "0.5", status)
    followed = host("follow")
    assert followed.stdout == f"-m|drl_jax.main|--distributed|a b|0.5|{status}\n"
    assert host("status").stdout == f"{status}\n"


def test_a_running_program_is_stopped_before_the_next_starts(host):
    host.start("600", "0")
    assert host("status").stdout == "running\n"
    before = time.monotonic()
    host.start("0", "5")
    assert time.monotonic() - before > SAVING
    assert host("follow").stdout == "-m|drl_jax.main|--distributed|0|5\n"
    assert host("status").stdout == "5\n"


def test_a_program_that_ended_without_a_status_counts_as_killed(host):
    host.start("600", "0")
    os.killpg(int(host.pid.read_text()), signal.SIGKILL)
    host("follow")
    assert host("status").stdout == "137\n"


# ---- slurm_gpu.sh and gpu_box.sh


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project with a .venv that is already installed and runs this Python."""
    monkeypatch.delenv("EXTRA", raising=False)  # set where `test.sh` runs the tests
    root = tmp_path / "project"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch", "drl_jax", "configs", "pyproject.toml"):
        (root / name).symlink_to(tiny.ROOT / name)
    shutil.copy(root / "pyproject.toml", root / ".venv" / "installed.cuda.toml")
    python = root / ".venv" / "bin" / "python"
    _executable(python, "#!/bin/sh", f'exec {shlex.quote(sys.executable)} "$@"')
    return root


INSTALL = [
    "python3 -m venv .venv",
    r".venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .\[cuda\]",
    "cp pyproject.toml .venv/installed.cuda.toml",
]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("script", "before", "command"),
    [
        (
            "slurm_gpu.sh",
            [],
            "srun --cpus-per-task=8 --gpu-bind=none --kill-on-bad-exit=0 .venv/bin/python",
        ),
        ("gpu_box.sh", ["nvidia-smi --list-gpus"], "exec .venv/bin/python"),
    ],
)
def test_a_dry_run_on_gpus_prints_the_commands(project, installed, script, before, command):
    if not installed:
        shutil.rmtree(project / ".venv")
    args = ["--dry-run", "--config=configs/digits.py", "--workdir=/shared/a run"]
    ended = subprocess.run(
        ["bash", f"launch/{script}", *args],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == [
        *before,
        *([] if installed else INSTALL),
        rf"{command} -m drl_jax.main --config=configs/digits.py --workdir=/shared/a\ run",
    ]
    assert (project / ".venv").exists() is installed


def test_a_slurm_job_has_one_task_per_gpu(project, monkeypatch):
    for name, value in (("JOB_ID", "1"), ("NTASKS_PER_NODE", "1"), ("GPUS_PER_NODE", "a100:4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    ended = launch("slurm_gpu.sh", "--workdir=/shared/a", cwd=project)
    assert ended.returncode == 1
    assert re.fullmatch(
        r"error: --ntasks-per-node=1 .*--gpus-per-node=a100:4.*\n", ended.stderr
    )


def test_a_slurm_job_must_be_submitted_from_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    ended = launch("slurm_gpu.sh", "--workdir=/shared/a")
    assert ended.returncode == 1
    assert re.fullmatch(rf"error: {tmp_path} is not the root [^\n]*\n", ended.stderr)


@pytest.fixture
def slurm(stand_ins, project, tmp_path, monkeypatch):
    """A function that starts slurm_gpu.sh as a job of two tasks, with one CPU device each."""
    calls = tmp_path / "calls"
    stand_ins(
        "srun",
        "import signal, subprocess",
        "words = sys.argv[1:]",
        "command = words[words.index('.venv/bin/python'):]",
        "step = {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1'}",
        "tasks = [",
        "    subprocess.Popen(",
        "        command,",
        "        env=os.environ | step | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},",
        "    )",
        "    for i in range(int(os.environ['SLURM_NTASKS']))",
        "]",
        f"open({str(tmp_path / 'srun')!r}, 'w').write(str(os.getpid()))",
        "def forward(signum, _):",
        "    for task in tasks:",
        "        task.send_signal(signum)",
        "signal.signal(signal.SIGTERM, forward)",
        "sys.exit(max(task.wait() for task in tasks))",
    )
    stand_ins(
        "scontrol",
        f"print(json.dumps(['scontrol', *sys.argv[1:]]), file=open({str(calls)!r}, 'a'))",
    )
    variables = {"SUBMIT_DIR": str(project), "JOB_ID": str(os.getpid()), "NTASKS": "2"}
    variables |= {"NTASKS_PER_NODE": "2", "GPUS_PER_NODE": "2", "CPUS_PER_TASK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    flags = f"--xla_force_host_platform_device_count=1 {tiny.COMPILE_FAST}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tiny.COMPILED))
    spooled = shutil.copy(LAUNCH / "slurm_gpu.sh", tmp_path / "slurm_script")

    def start(*args):
        return subprocess.Popen(
            ["bash", spooled, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.srun, start.calls = tmp_path / "srun", calls
    return start


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_limit_and_resumes(slurm, tmp_path):
    """Slurm sends SIGTERM before the time limit. Two tasks find each other without flags."""
    workdir = epath.Path(tmp_path) / "run"
    changes = {"log__sample_every_steps": 1000, "checkpoint__every_steps": 5}
    args = tiny.training(workdir, train__num_steps=40, evaluation__num_samples=20, **changes)
    job = slurm(*args)
    wait_until(lambda: (workdir / "checkpoints" / "5").exists(), job)
    os.kill(int(slurm.srun.read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 143, output
    assert recorded(slurm.calls) == [["scontrol", "requeue", str(os.getpid())]]
    *_, newest = steps(workdir)
    assert 5 <= newest < 40
    job = slurm(*args)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert output.count(f"resuming from step {newest} of 40") == 1  # only the first task logs
    assert steps(workdir)[-1] == 40
    assert len(recorded(slurm.calls)) == 1


def test_a_slurm_job_that_fails_is_not_queued_again(slurm, tmp_path):
    job = slurm("--mode=sample", f"--workdir={tmp_path / 'nothing'}")
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 1, output
    assert "no checkpoint" in output
    assert not slurm.calls.exists()


def test_a_machine_without_gpus_is_an_error_of_one_line(stand_ins):
    stand_ins("nvidia-smi", "print('NVIDIA-SMI has failed', file=sys.stderr)", "sys.exit(9)")
    ended = launch("gpu_box.sh", "--config=configs/digits.py")
    assert ended.returncode == 1
    assert re.fullmatch(r"error: no NVIDIA GPU found [^\n]*\n", ended.stderr)


def test_the_script_for_a_gpu_box_is_replaced_by_the_program(stand_ins, project):
    """It has the same process ID, so that it receives signals, and its status is returned."""
    stand_ins("nvidia-smi", "print(sys.argv[1:])")
    _executable(
        project / ".venv" / "bin" / "python",
        f"#!{sys.executable}",
        "import os, sys",
        "print(os.getpid(), *sys.argv[1:], sep='|')",
        "sys.exit(143)",
    )
    started = subprocess.Popen(
        ["bash", project / "launch" / "gpu_box.sh", "--config=a b", "--workdir=c"],
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = started.communicate(timeout=60)
    assert output == (
        f"['--list-gpus']\n{started.pid}|-m|drl_jax.main|--config=a b|--workdir=c\n"
    )
    assert started.returncode == 143


# ---- test.sh


@pytest.mark.parametrize("fast", [True, False])
def test_fast_skips_slow_tests_and_other_options_go_to_pytest(project, fast):
    shutil.copy(project / "pyproject.toml", project / ".venv" / "installed.test.toml")
    for tool in ("ruff", "mypy"):
        _executable(project / ".venv" / "bin" / tool, "#!/bin/sh")
    _executable(project / ".venv" / "bin" / "python", "#!/bin/sh", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        ["bash", project / "launch" / "test.sh", *(["--fast"] if fast else []), "-k", "a b"],
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = done.stdout.splitlines()
    assert arguments[:2] == ["-m", "pytest"]
    assert arguments[-2:] == ["-k", "a b"]
    assert ("not slow and not infrastructure" in arguments) is fast


# ---- demo.sh


def test_the_demo_ends_with_commands_that_the_program_accepts(project):
    shutil.copy(project / "pyproject.toml", project / ".venv" / "installed.toml")
    _executable(project / ".venv" / "bin" / "python", "#!/bin/sh", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        ["bash", project / "launch" / "demo.sh", "--workdir=runs/a b", "--config.seed=1"],
        capture_output=True,
        text=True,
        check=True,
    )
    program, _, text = done.stdout.partition("\n\n")
    options = ["--config=configs/digits.py", "--workdir=runs/a b", "--config.seed=1"]
    assert program.splitlines() == ["-m", "drl_jax.main", *options]
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    modes = [command[2:] for command in commands if command[:2] == ["python", "-m"]]
    assert [command_line.parse(mode).task.name for mode in modes] == ["inpaint", "interpolate"]
    assert all(command_line.parse(mode).values["workdir"] == "runs/a b" for mode in modes)


def test_the_demo_writes_to_the_folder_that_the_readme_names(project):
    shutil.copy(project / "pyproject.toml", project / ".venv" / "installed.toml")
    _executable(project / ".venv" / "bin" / "python", "#!/bin/sh", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        ["bash", project / "launch" / "demo.sh"], capture_output=True, text=True, check=True
    )
    assert "--workdir=runs/digits" in done.stdout.splitlines()
    assert "--workdir=runs/digits" in (tiny.ROOT / "README.md").read_text()
