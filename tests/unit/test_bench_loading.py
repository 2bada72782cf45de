from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_host_holds_the_network_and_hardly_more(tmp_path):
    sizes = {"none": 1.0, "bnb-int8": 0.52, "bnb-nf4": 0.29}
    command = [sys.executable, ROOT / "bench" / "loading.py", "--size", "512", "--methods", ",".join(sizes)]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json", tmp_path / "table.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["none"]["bytes"] >= 512 << 20
    for method, share in sizes.items():
        row = table[method]
        assert row["final"] == pytest.approx(share * row["bytes"], rel=0.06)
        assert 0.98 * row["final"] <= row["peak"] <= row["final"] + 0.3 * row["shard"]
        assert row["ratio"] <= 1.10
