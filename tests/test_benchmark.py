import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "drl_jax.benchmark", "--quick", "--repeats=1"]
    command += ["--config=configs/digits.py", "--K=1"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(path.read_text())["programs"]
    assert [row["name"] for row in rows] == ["forward pass", "chain step", "training step"]
    assert all(row["name"] in done.stdout and row["efficiency"][0] > 0 for row in rows)
