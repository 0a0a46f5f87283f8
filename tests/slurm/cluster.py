"""A real Slurm of several nodes on one machine: munge, slurmctld, a slurmd a node, all in one folder; all gone after.

    with Cluster(folder, nodes=3, cpus=4) as cluster:
        job = cluster.sbatch("slurm/cpu.sbatch", "job.toml", options=["--ntasks=3"], cwd=folder)
        cluster.wait(job, {"COMPLETED"}, seconds=60)

Needs root and Debian's packages (`PACKAGES`). Every slurmd has a host name and a `/dev/shm` of its own, so that MPI
libraries take the nodes for different machines; the network and the files are shared, as on a cluster.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "libpmi2-0")
"""Debian's packages: `apt-get install -y --no-install-recommends ...`."""

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "squeue", "unshare")
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_OUTER = re.compile(r"(SLURM|SRUN|SBATCH|PMI|PMIX|HYDI|MPI_LOCAL|OMPI_COMM_WORLD)_?")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

_CONFIGURATION = """\
ClusterName=mpifed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
TmpFS={folder}/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=15
SlurmdTimeout=60
MessageTimeout=30
MinJobAge=600
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


class SlurmUnavailable(Exception):
    """Slurm cannot run here; the message says why, and what would help."""


def require() -> None:
    """Raise `SlurmUnavailable` where a `Cluster` cannot be started."""
    missing = [program for program in _PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        install = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        raise SlurmUnavailable(f"no Slurm here ({', '.join(missing)} not found); install it: {install}")
    if os.getuid() != 0:
        raise SlurmUnavailable("Slurm's nodes need namespaces of their own, which only root can make; run as root")
    tried = subprocess.run(["unshare", "-u", "-m", "true"], capture_output=True, text=True, timeout=30)
    if tried.returncode != 0:
        raise SlurmUnavailable(f"namespaces cannot be made here ({tried.stderr.strip()}); allow CAP_SYS_ADMIN")


class Cluster:
    """Nodes n1, n2, ...: partition `main`, and on the same nodes `urgent`, whose jobs preempt those of `main`.

    A preempted job is sent TERM, and is requeued when it has not left within `grace_s` seconds.
    """

    grace_s = 30

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 4) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.conf = folder / "slurm.conf"
        inherited = {name: value for name, value in os.environ.items() if not _OUTER.match(name)}
        self.environment = inherited | {"PATH": _PATH, "SLURM_CONF": str(self.conf)}

    # --- up and down --------------------------------------------------------------------------------------------------
    def __enter__(self) -> Cluster:
        require()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _start(self) -> None:
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        for name in ("state", *(f"{kind}/{node}" for kind in ("spool", "tmp") for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} RealMemory=4000"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        everywhere = f"Nodes=n[1-{len(self.nodes)}] MaxTime=60 State=UP"
        partitions = [
            f"PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace_s} {everywhere}",
            f"PartitionName=urgent PriorityTier=2 PreemptMode=OFF {everywhere}",
        ]
        conf = _CONFIGURATION.format(host=host, port=ports[0], folder=self.folder)
        self.conf.write_text(conf + "\n".join([*nodes, *partitions]) + "\n")
        hosts = [f"127.0.0.1 {name}" for name in ("localhost", host, *self.nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        self._start_munge()
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self._daemon("unshare", "-u", "-m", "--propagation", "slave", "bash", "-c", self._node_script(node))
        idle = len(self.nodes)
        _until(lambda: self._say("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D") == str(idle), 30, self.logs)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *options)
        _until(lambda: (self.folder / "munge.socket").exists(), 10, self.logs)

    def _node_script(self, node: str) -> str:
        tmp, hosts = self.folder / "tmp" / node, self.folder / "hosts"
        mounts = f"mount -t tmpfs tmpfs /dev/shm && mount --bind '{hosts}' /etc/hosts"
        return f"hostname {node} && {mounts} && export TMPDIR='{tmp}' && exec slurmd -D -N {node} -f '{self.conf}'"

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def _stop(self) -> None:
        """Cancel what runs, end the daemons, and kill whatever of this cluster is left."""
        if self.conf.exists():
            subprocess.run(["scancel", "--full", "--user=root"], env=self.environment, capture_output=True, timeout=60)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and self._say("squeue", "-h", "-o", "%i"):
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(daemon.poll() is None for daemon in self._daemons):
            time.sleep(0.05)
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            for daemon in self._daemons:
                daemon.poll()
            time.sleep(0.05)
        for daemon in self._daemons:
            daemon.wait()

    def processes(self) -> list[int]:
        """Every living process of this cluster: its daemons, its jobs and what they started."""
        mark, found = str(self.conf).encode(), []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                mine = mark in Path(f"/proc/{pid}/environ").read_bytes()
                mine = mine or str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if mine and pid != os.getpid() and _state(pid) != "Z":
                found.append(pid)
        return found

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    # --- jobs ---------------------------------------------------------------------------------------------------------
    def sbatch(
        self,
        script: Path,
        *arguments: str | os.PathLike[str],
        cwd: Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit `sbatch OPTIONS SCRIPT ARGUMENTS` from the folder `cwd`; the job's number (an array's first)."""
        command = ["sbatch", "--parsable", *options, str(script), *map(os.fspath, arguments)]
        environment = self.environment | dict(env or {})
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return int(done.stdout.split(";")[0])

    def scontrol(self, *arguments: str) -> str:
        """What `scontrol ARGUMENTS` prints. Raises `AssertionError` where it fails."""
        done = subprocess.run(
            ["scontrol", *arguments], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"scontrol {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as `JobState`, `Restarts`, `ExitCode` and `NodeList`."""
        words = self.scontrol("show", "job", str(job), "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, job: int | str, states: Collection[str], seconds: float, output: Path | None = None
    ) -> dict[str, str]:
        """The job's fields once it is in one of `states`.

        Raises `AssertionError`, with the job's `output`, after `seconds` or where the job ended in another state.
        """
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
        deadline = time.monotonic() + seconds
        while True:
            fields = self.job(job)
            if fields["JobState"] in states:
                return fields
            if fields["JobState"] in ended or time.monotonic() > deadline:
                text = output.read_text(errors="replace")[-6000:] if output is not None and output.exists() else ""
                raise AssertionError(
                    f"job {job} is {fields['JobState']}, not {states}: {fields}\n{text}\n{self.logs()}"
                )
            time.sleep(0.1)

    def start_again(self, job: int | str, restarts: int, seconds: float) -> None:
        """Wait until a job has been requeued so many times, and let it start now; Slurm would wait two minutes."""
        deadline = time.monotonic() + seconds
        while True:
            fields = self.job(job)
            state = fields["JobState"]
            if int(fields["Restarts"]) >= restarts and state in ("RUNNING", "COMPLETED"):
                return
            assert time.monotonic() < deadline, f"job {job} does not start again: {fields}\n{self.logs()}"
            if state == "PENDING":
                time.sleep(2.0)  # within a second of a job's end a slurmd takes the same job's start for a late message
                command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(command, env=self.environment, capture_output=True, timeout=60)
            time.sleep(0.2)

    def signal(self, job: int | str, number: signal.Signals) -> None:
        """Send a signal to the batch script, as Slurm does before a time limit."""
        name = number.name.removeprefix("SIG")
        command = ["scancel", "--batch", f"--signal={name}", str(job)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def fail_node(self, node: str) -> None:
        """Set a node down: Slurm requeues its jobs."""
        self.scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def repair_node(self, node: str) -> None:
        """Set a node in service again, unless it is already, because it has answered meanwhile."""
        command = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(command, env=self.environment, capture_output=True, timeout=60)

    def cancel(self, job: int | str) -> None:
        """Cancel a job, if it has not ended."""
        subprocess.run(["scancel", str(job)], env=self.environment, capture_output=True, timeout=60)

    def _say(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()


def _die_with_parent() -> None:
    """In the new process: be ended when the test process dies, however it dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"Slurm did not come up within {seconds} s\n{explain()}"
        time.sleep(0.05)
