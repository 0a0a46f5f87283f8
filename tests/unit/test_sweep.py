"""Sweep files: which members they stand for, what is refused, what a member's folder says, and how members are run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpifed.__main__ import main as mpifed_main
from mpifed.errors import BAD_INPUT, BadInput
from mpifed.job import from_document, load, merge
from mpifed.storage.run_folder import RunFolder
from mpifed.sweep.command import main
from mpifed.sweep.plan import LONGEST_NAME, SNAPSHOT, Number, Sweep, is_sweep, published, read_sweep
from mpifed.sweep.state import disagreement, state_of, validate

ROOT = Path(__file__).resolve().parents[2]

SWEEP = """
seeds = [0, 1]
ranks = 3
[grid]
"data.partition.alpha" = [0.1, 1.0]
[[variant]]
label = "FedAvg"
set = { "algorithm.name" = "fedavg" }
[[variant]]
label = "FedProx, strong"
ranks = 1
set = { "algorithm.name" = "fedprox", "algorithm.mu" = 0.5 }
"""


def write(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    """A sweep file whose members go to `tmp_path / "out"`."""
    path = tmp_path / name
    path.write_text(f'out = "{tmp_path / "out"}"\n{text}', encoding="utf-8")
    return path


def read(tmp_path: Path, text: str) -> Sweep:
    return read_sweep(write(tmp_path, text))


# --- members ----------------------------------------------------------------------------------------------------------
def test_members_are_variants_by_grid_by_seeds(tmp_path: Path) -> None:
    """2 variants x 2 values x 2 seeds; the default job, which has fedavg, alpha 0.5 and 20 rounds, is the base."""
    sweep = read(tmp_path, SWEEP)
    assert [member.name for member in sweep.members] == [
        *("FedAvg-alpha0.1-seed0", "FedAvg-alpha0.1-seed1", "FedAvg-alpha1.0-seed0", "FedAvg-alpha1.0-seed1"),
        *("FedProx-strong-alpha0.1-seed0", "FedProx-strong-alpha0.1-seed1"),
        *("FedProx-strong-alpha1.0-seed0", "FedProx-strong-alpha1.0-seed1"),
    ]
    last = sweep.members[-1]
    assert (last.index, last.variant, last.point, last.seed, last.ranks) == (
        *(7, "FedProx, strong", {"data.partition.alpha": 1.0}, 1, 1),
    )
    assert last.folder.path == tmp_path / "out" / last.name
    job = validate(sweep.members)[last.name]
    assert (job.algorithm.parameters["mu"], job.data.partition.parameters["alpha"], job.seed) == (0.5, 1.0, 1)
    assert (job.rounds, job.out, sweep.members[0].ranks) == (20, str(last.folder.path), 3)


def test_names_stay_when_values_are_added(tmp_path: Path) -> None:
    before = {member.name: member.overrides for member in read(tmp_path, SWEEP).members}
    more = SWEEP.replace("[0.1, 1.0]", "[0.05, 0.1, 1.0]").replace("[0, 1]", "[0, 1, 2]")
    after = {member.name: member.overrides for member in read(tmp_path, more).members}
    assert len(after) == 18 and before.items() <= after.items()


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ("[grid]\nlocal.steps = [1, 20]", ["steps1", "steps20"]),  # dotted without quotes is the same
        ('[grid]\n"model.name" = ["mlp", "cnn"]', ["modelmlp", "modelcnn"]),
        ('[grid]\n"model.hidden" = [[200, 100], []]', ["hidden200-100", "hidden"]),
        ('[grid]\n"data.partition" = [{name = "iid"}, {name = "dirichlet", alpha = 0.1}]', None),
        ('[grid]\n"algorithm.mu" = [1]\n"x.mu" = [2]', ["algorithm.mu1-x.mu2"]),
        ('[grid]\n"data.name" = ["../../a b/c"]', ["data..-..-a-b-c"]),
        ("[grid]\nlocal.nesterov = [true]", ["nesterovtrue"]),
        ("", ["run"]),
    ],
)
def test_names_are_short_and_safe(tmp_path: Path, grid: str, names: list[str] | None) -> None:
    names = names or ["partitioniid", "partitiondirichlet-0.1"]
    assert [member.name for member in read(tmp_path, grid).members] == names


def test_a_long_name_is_cut_and_stays_different(tmp_path: Path) -> None:
    long = "x" * 100
    names = [m.name for m in read(tmp_path, f'[grid]\n"data.name" = ["{long}a", "{long}b"]').members]
    assert all(len(name) == LONGEST_NAME for name in names) and names[0] != names[1]


def test_the_base_is_found_beside_the_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "base.toml").write_text(
        (ROOT / "jobs" / "digits.toml").read_text().replace("rounds = 20", "rounds = 7")
    )
    path = write(tmp_path, 'base = "../base.toml"', "jobs/s.toml")
    assert validate(read_sweep(path).members)["run"].rounds == 7


def test_a_job_can_stand_in_the_sweep_file(tmp_path: Path) -> None:
    job = '[job]\nrounds = 2\nclients = 3\nmodel.name = "mlp"\ndata.name = "digits"\ncodec = {"up.update" = "half"}'
    sweep = read(tmp_path, job + '\n[grid]\n"codec.up.update" = ["identity"]')
    assert validate(sweep.members)["updateidentity"].codec == {"up.update": "identity"}


def test_the_order_of_overrides_does_not_matter(tmp_path: Path) -> None:
    """A name in the grid and its parameters in a variant: the name never drops the parameters given with it."""
    text = '[grid]\n"algorithm.name" = ["fedprox"]\n[[variant]]\nlabel = "a"\nset = { "algorithm.mu" = 0.3 }'
    assert validate(read(tmp_path, text).members)["a-algorithmfedprox"].algorithm.parameters["mu"] == 0.3


def test_the_name_of_a_base_survives_the_name_of_its_algorithm() -> None:
    merged = merge({"algorithm": {"name": "a", "mu": 1}}, {"algorithm.base.name": "b", "algorithm.name": "c"})
    assert merged == {"algorithm": {"name": "c", "base": {"name": "b"}}}


def test_the_snapshot_reads_as_the_sweep(tmp_path: Path) -> None:
    sweep = read(tmp_path, SWEEP)
    sweep.folder.mkdir()
    sweep.save()
    again = read_sweep(sweep.folder)
    assert is_sweep(sweep.folder) and not is_sweep(tmp_path)
    assert again.name == "mine" and again.folder == sweep.folder
    assert [(m.name, m.document, m.ranks) for m in again.members] == [
        (m.name, m.document, m.ranks) for m in sweep.members
    ]
    (sweep.folder / SNAPSHOT).write_text("[]")
    with pytest.raises(BadInput, match="is damaged"):
        read_sweep(sweep.folder)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sedes = [1]", "`sedes` is not a key of a sweep; did you mean `seeds`"),
        ('[[variant]]\nlabel = "a"\nsets = {}', "`variant.sets` is not a key of [[variant]]; did you mean"),
        ('seeds = ["a"]', "seeds.0: must be an integer, but it says"),
        ("ranks = 0", "ranks: must be"),
        ("[grid]\nrounds = 3", "grid.rounds: must be an array of values, but it says 3"),
        ("[grid]\nrounds = []", "grid.rounds: must be an array of values, but it says []"),
        ('columns = "rounds"\n[grid]\nclients = [1]', "columns: 'rounds' is not a key of the grid; its keys: clients"),
        ("seeds = [1, 1]", "seeds: 1 is there twice"),
        ("[grid]\nclients = [3, 3]", "two members would be called 'clients3'"),
        ('[[variant]]\nlabel = "a b"\n[[variant]]\nlabel = "a/b"', "two members would be called 'a-b'"),
        ('[[variant]]\nlabel = "a"\n[[variant]]\nlabel = "a"', "variant.label: 'a' is there twice"),
        ('[[variant]]\nlabel = "logs"', "no member can be called 'logs'"),
        ("[grid]\nout = ['x']", "grid: `out` is given to each member by the sweep"),
        ("seeds = [1]\n[grid]\nseed = [1]", "grid: `seed` is set by `seeds`"),
        ('[grid]\nrounds = [1]\n[[variant]]\nlabel = "a"\nset.rounds = 2', "variant a: `rounds` is set by the grid as"),
        ('base = "a.toml"\n[job]\nrounds = 1', "base and [job] exclude each other"),
        ('base = "a.toml"', "a.toml cannot be read: No such file"),
        ("x = [", "is not valid TOML"),
        (
            'published = { source = "s", values = { fedavgg = 1 } }',
            "published: 'fedavgg' is not a variant; they are: fe",
        ),
        ('published = { source = "s", values = { fedavg = { "0.1" = 1 } } }', "'0.1' is not a value of a grid"),
        ('published = { source = "s", values = { fedavg = "x" } }', 'must be a number or [mean, std], but it says "x"'),
        ('published = { source = "s", values = { fedavg = [1, 2, 3] } }', "must be a number or [mean, std]"),
        ('published = { source = "s", metric = "best", values = {} }', "published.metric: 'best' is not a metric"),
        ('published = { source = "s", where = { seed = 1 }, values = {} }', "published.where: seed = 1 is nowhere"),
    ],
)
def test_a_bad_sweep_names_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as refused:
        read_sweep(path)
    assert words in str(refused.value) and str(tmp_path) in str(refused.value)


def test_all_faults_of_all_members_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a fault with the members it is in, and nothing is written."""
    text = """
    [grid]
    clients = [3, 4, 0]
    [[variant]]
    label = "a"
    set = { "algorithm.muu" = 1 }
    [[variant]]
    label = "b"
    """
    assert mpifed_main(["sweep", str(write(tmp_path, text)), "--run"]) == BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "algorithm.muu" in lines[0] and lines[0].endswith("(in a-clients3, a-clients4, a-clients0)")
    assert lines[1].startswith("clients: must be") and lines[1].endswith("(in b-clients0)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--only", "nobody*"], ["--index", "8"], ["--launcher", "no-such-launcher"]])
def test_bad_arguments_start_nothing(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert mpifed_main(["sweep", str(write(tmp_path, SWEEP)), "--run", *arguments]) == BAD_INPUT
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what a folder says -----------------------------------------------------------------------------------------------
def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New, empty, without a checkpoint, after 7 of 20 rounds, complete; another job, and something else."""
    sweep = read(tmp_path, SWEEP)
    jobs = validate(sweep.members)

    def state(index: int) -> tuple[str, str]:
        found = state_of(sweep.members[index], jobs[sweep.members[index].name])
        return found.kind, found.text

    def begin(index: int) -> RunFolder:
        return RunFolder.create(sweep.members[index].folder.path, jobs[sweep.members[index].name].to_toml())

    assert state(0) == ("new", "new")
    begin(1)
    assert state(1) == ("unfinished", "0 of 20 rounds")
    folder = begin(2)
    for t in range(1, 8):
        folder.append_metrics({"round": t})
    assert state(2) == ("unfinished", "7 of 20 rounds")
    begin(3).write_summary({"complete": True})
    assert state(3) == ("complete", "complete")
    RunFolder.create(sweep.members[4].folder.path, jobs["FedAvg-alpha0.1-seed0"].to_toml())
    kind, text = state(4)
    assert kind == "conflict" and 'algorithm.name "fedavg", not "fedprox"' in text
    sweep.members[5].folder.path.mkdir()
    assert state(5) == ("new", "new")
    (sweep.members[5].folder.path / "thesis.tex").touch()
    assert state(5)[0] == "conflict"

    assert main([str(tmp_path / "mine.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:5] == ["2", "FedAvg-alpha1.0-seed0", "7", "of", "20"]
    assert lines[-1].endswith("1 complete, 2 unfinished, 3 new, 2 conflict")
    assert main([str(tmp_path / "mine.toml"), "--only", "*alpha1.0-seed1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(BadInput, match="holds another job"):
        main([str(tmp_path / "mine.toml"), "--run", "--launcher", sys.executable])


def test_what_cannot_change_results_may_change(tmp_path: Path) -> None:
    """Another device is not another job; a run that goes on is told of it."""
    sweep = read(tmp_path, SWEEP)
    member, job = sweep.members[0], validate(sweep.members)["FedAvg-alpha0.1-seed0"]
    RunFolder.create(member.folder.path, load(job.to_toml(), ["device=cpu", "checkpoint.keep=5"]).to_toml())
    state = state_of(member, job)
    assert (state.kind, state.changed) == ("unfinished", ("checkpoint.keep=2", 'device="auto"'))


def test_a_report_sees_another_job_without_validating(tmp_path: Path) -> None:
    """Defaults are filled in, `steps` drops `epochs`, and where a run lies is no difference."""
    member = read(tmp_path, '[grid]\n"local.steps" = [3]\ncodec = [{"up.update" = "half"}]').members[0]
    recorded = json.loads(from_document(member.document).model_dump_json())
    assert disagreement(member, recorded) == ""
    assert disagreement(member, recorded | {"out": "elsewhere", "device": "cuda"}) == ""
    assert disagreement(member, recorded | {"rounds": 3}) == "rounds 3, not 20"
    assert disagreement(member, {}).endswith("more")


# --- published numbers ------------------------------------------------------------------------------------------------
def test_published_numbers_are_found_by_variant_and_column(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        SWEEP.replace(
            "ranks = 3", "ranks = 3\n[published]\nsource = 's'\nvalues = { FedAvg = { '0.1' = [90.2, 0.6] } }"
        ),
    )
    (table,) = sweep.settings.published
    assert published(sweep, table, "FedAvg", 0.1) == Number(90.2, 0.6)
    assert published(sweep, table, "FedAvg", 1.0) is None
    assert published(sweep, table, "FedProx, strong", 0.1) is None


# --- running, with a launcher that is no MPI --------------------------------------------------------------------------
LAUNCHER = """#!{python}
# Stands in for mpirun: what a member does is said by the seed in its name, which ends the path of its job or folder.
import json, os, signal, sys, time
from pathlib import Path

assert sys.argv[1] == "-n" and sys.argv[4:6] == ["-m", "mpifed.run"], sys.argv
with open("{log}", "a") as file:
    file.write(" ".join(sys.argv[1:3] + sys.argv[6:]) + "\\n")
resumed = sys.argv[6] == "--resume"
folder = Path(sys.argv[7]) if resumed else Path(sys.argv[6]).parents[1] / Path(sys.argv[6]).stem
if not resumed:
    folder.mkdir()
    (folder / "job.toml").write_text(Path(sys.argv[6]).read_text())
seed = int(folder.name[-1])
if seed == 1 and not resumed:
    print("mpifed: rank 0 fell over", flush=True)
    print("and its launcher says so", flush=True)
    sys.exit(3)
if seed in (2, 3) and not resumed:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75) if seed == 2 else None)
    signal.signal(signal.SIGINT, lambda *_: None)
    Path("{log}.ready").touch()
    time.sleep(30)
(folder / "summary.json").write_text(json.dumps({{"complete": seed != 4, "accuracy": {{"final": 0.5}}}}))
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    path = tmp_path / "launcher"
    path.write_text(LAUNCHER.format(python=sys.executable, log=tmp_path / "calls"))
    path.chmod(0o755)
    return path


def run(tmp_path: Path, launcher: Path, seeds: str, *arguments: str) -> int:
    return main([str(write(tmp_path, f"seeds = {seeds}\nranks = 3")), "--run", "--launcher", str(launcher), *arguments])


def calls(tmp_path: Path) -> list[str]:
    """What the launcher was called with since the last time."""
    lines = (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "calls").unlink()
    return [line.replace(str(tmp_path / "out"), "OUT") for line in lines]


def test_a_failed_member_does_not_stop_the_others(
    tmp_path: Path, launcher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its exit code is the sweep's; then it alone goes on, and then there is nothing left to do."""
    assert run(tmp_path, launcher, "[0, 1, 5]") == 3
    assert calls(tmp_path) == [f"-n 3 OUT/jobs/seed{seed}.toml" for seed in (0, 1, 5)]
    said = capsys.readouterr().out
    assert "FAILED    seed1  exit code 3: rank 0 fell over" in said
    assert f"failed: seed1 (exit code 3), log: {tmp_path / 'out' / 'logs' / 'seed1.log'}" in said
    assert "3 members in" in said and "2 complete, 1 failed" in said
    assert "fell over" in (tmp_path / "out" / "logs" / "seed1.log").read_text()
    job = (tmp_path / "out" / "jobs" / "seed5.toml").read_text()
    assert load(job).seed == 5 and load(job).out == str(tmp_path / "out" / "seed5")

    assert run(tmp_path, launcher, "[0, 1, 5]", "--ranks", "2") == 0
    assert calls(tmp_path) == ["-n 2 --resume OUT/seed1"]
    assert run(tmp_path, launcher, "[0, 1, 5]") == 0
    assert not (tmp_path / "calls").exists()
    assert capsys.readouterr().out.endswith("all complete\n")


def test_an_exit_code_of_0_is_not_trusted(tmp_path: Path, launcher: Path) -> None:
    assert run(tmp_path, launcher, "[4]") == 1
    assert run(tmp_path, launcher, "[4, 1]") == 1  # two failures of different codes


def test_one_member_by_its_index(tmp_path: Path, launcher: Path) -> None:
    path = write(tmp_path, "seeds = [7, 8, 9]")
    assert main([str(path), "--index", "1", "--launcher", f"{launcher}"]) == 0
    assert calls(tmp_path) == ["-n 1 OUT/jobs/seed8.toml"]


@pytest.mark.parametrize(("seed", "signals"), [(2, 1), (3, 3)])
def test_signals_are_passed_on_and_nothing_else_is_started(
    tmp_path: Path, launcher: Path, capsys: pytest.CaptureFixture[str], seed: int, signals: int
) -> None:
    """Seed 2 leaves when asked to checkpoint; seed 3 hears neither that nor SIGINT, and is killed by the third."""
    ready = tmp_path / "calls.ready"

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    assert run(tmp_path, launcher, f"[{seed}, 7]") == 75
    sender.join()
    assert calls(tmp_path) == [f"-n 3 OUT/jobs/seed{seed}.toml"]
    said = capsys.readouterr().out
    assert said.count("SIGUSR1") == 1 and said.count("SIGKILL") == (signals == 3)
    assert "1 stopped, 1 not started" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(tmp_path, launcher, f"[{seed}, 7]") == 0
    assert calls(tmp_path) == [f"-n 3 --resume OUT/seed{seed}", "-n 3 OUT/jobs/seed7.toml"]


def test_members_run_at_once(tmp_path: Path, launcher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, launcher, "[5, 6, 7]", "--parallel", "2") == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()][:3]
    assert first == ["start", "start", "complete"]


def test_the_batch_script_runs_a_member_and_asks_for_a_requeue(tmp_path: Path, launcher: Path) -> None:
    """slurm/run.sh with stand-ins for Slurm's commands: task 0 of an array is stopped by USR1, and goes on."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    options = "--mpi=pmi2 --kill-on-bad-exit=0 --wait=60"
    srun = f'[ "$1" = "--mpi=list" ] && echo pmi2; [ "$1 $2 $3" = "{options}" ] && shift 3 && exec {launcher} "$@"'
    python = f'exec {sys.executable} "$@"'
    scontrol = f'echo "$@" > {tmp_path / "requeued"}'
    lines = {"srun": srun, "python": python, "scontrol": scontrol, "squeue": "echo RUNNING", "mpirun": "echo HYDRA"}
    for name, line in lines.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin_ / name).chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "43"}
    paths = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "slurm" / "run.sh"), "sweep", str(write(tmp_path, "seeds = [2, 5]"))]

    batch = subprocess.Popen(command, cwd=tmp_path, env=os.environ | slurm | paths)
    deadline = time.monotonic() + 120
    while not (tmp_path / "calls.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(120) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 42_0\n"
    assert subprocess.run(command, cwd=tmp_path, env=os.environ | slurm | paths, timeout=120).returncode == 0
    assert calls(tmp_path) == ["-n 4 OUT/jobs/seed2.toml", "-n 4 --resume OUT/seed2"]


def test_a_sweep_is_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mpifed_main(["run", str(write(tmp_path, SWEEP))]) == BAD_INPUT
    assert "is a sweep, of many jobs: python -m mpifed sweep" in capsys.readouterr().err


def test_members_are_known_without_torch() -> None:
    program = (
        "import sys; from mpifed.sweep.plan import read_sweep; "
        "n = len(read_sweep('jobs/sweeps/digits.toml').members); print(n, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("12 False\n", "")


SWEEPS = [path for path in sorted((ROOT / "jobs").rglob("*.toml")) if is_sweep(path)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(ROOT / "jobs")))
def test_the_sweeps_of_the_project_are_valid(path: Path) -> None:
    assert validate(read_sweep(path).members)
