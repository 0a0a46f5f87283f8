"""`mpifed doctor` in a job of a real Slurm: the type of `srun --mpi` that is right, and one that is not."""

from __future__ import annotations

import sys

import pytest

from mpifed.errors import BAD_INPUT
from tests.launch import ROOT
from tests.slurm.site import NODES, START_S, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("kind", "code"), [("pmi2", 0), ("none", BAD_INPUT)])
def test_srun(kind: str, code: int, site: Site) -> None:
    """Three ranks on three nodes, each of which looks at its own; with `none` they do not see each other."""
    line = f"srun --mpi={kind} {sys.executable} -m mpifed doctor --out . ; echo left with $?"
    script = site.script(line)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    job = site.cluster.sbatch(script, cwd=site.folder, options=NODES, env=environment)
    output = site.folder / f"line-{job}.out"
    site.cluster.wait(str(job), {"COMPLETED"}, START_S, output)
    text = output.read_text()
    assert f"left with {code}" in text, text
    assert "plain srun means --mpi=" in text and "slurm job" in text, text
    if kind == "none":
        assert text.count("the launcher started 3 processes (SLURM_STEP_NUM_TASKS)") == 1, text
    else:
        assert "3 that see each other: 1 on n1, 1 on n2, 1 on n3" in text, text
        assert "3 nodes agree to" in text, text
