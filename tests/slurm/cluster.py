"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd.

Each node has its own host name, /etc/hosts, process ids and one private folder, so that what only works on
one machine fails here. All of it lives in one process-id namespace that ends with the process that started
it, however that ends: nothing is left behind.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "sinfo", "unshare", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

SLURM_CONF = """
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.1.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.1.2 Port={ports[2]} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""

HOSTS = """
127.0.0.1 localhost {host}
127.0.1.1 node1
127.0.1.2 node2
"""

START = """
set -eu
mount -t proc proc /proc
munged -F --force --socket={folder}/munge/sock --key-file={folder}/munge/key \
    --log-file={folder}/log/munged.log --pid-file={folder}/munge/pid --seed-file={folder}/munge/seed &
while [ ! -S {folder}/munge/sock ]; do sleep 0.1; done
slurmctld -D -i -f {folder}/slurm.conf &
for node in node1 node2; do
    unshare --uts --mount --propagation private --pid --fork --kill-child --mount-proc sh -c "
        hostname $node
        mount --bind {folder}/hosts /etc/hosts
        mount -t tmpfs none {folder}/private
        exec slurmd -D -N $node -f {folder}/slurm.conf
    " &
done
wait
"""


def missing() -> str | None:
    """What this machine lacks for a cluster; None where nothing is missing."""
    lacking = [program for program in PROGRAMS if _find(program) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge (Debian), see README"
    if os.geteuid() != 0:
        return "not root, who alone may start slurmd with jobs in namespaces"
    allowed = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if allowed.returncode == 0 else f"no namespaces here ({allowed.stderr.decode().strip()})"


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """A running cluster.

    Args:
        folder: of its configuration and logs, short enough for a socket's path.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MOSHI_TTT_PYTHON": sys.executable,
        }

    @property
    def private(self) -> Path:
        """A folder that every node has for itself, as local disks are."""
        return self.folder / "private"

    def call(self, *command: str | Path, **environment: str) -> str:
        """Run a command of SLURM, or one that submits, which must succeed; returns what it printed."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, or of a task of an array such as 5_1."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=", 1)[1].split()[0]

    def restarts(self, job: str) -> int:
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return int(shown.split("Restarts=", 1)[1].split()[0])

    def wait(self, job: str, seconds: float = 300) -> str:
        """The state in which a job ends."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is {state}; {self.logs()}"
            time.sleep(0.3)
        return state

    def logs(self) -> str:
        """The ends of SLURM's own logs."""
        texts = [(path, path.read_text()[-2000:]) for path in sorted((self.folder / "log").iterdir())]
        return "\n".join(f"== {path.name}\n{text}" for path, text in texts)

    def wait_for_nodes(self, starter: subprocess.Popen, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        command = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
        while True:
            done = subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8")
            if len(done.stdout.split()) == 2:
                return
            assert starter.poll() is None, f"the cluster ended: {self.logs()}"
            assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}\n{self.logs()}"
            time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    listeners = [socket.socket() for _ in range(number)]
    for listener in listeners:
        listener.bind(("", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _end(starter: subprocess.Popen) -> None:
    """Kill the first process of the namespace, and return when all others in it have ended with it."""
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
    first = children.read_text().split() if starter.poll() is None else []
    for process in map(int, first):
        os.kill(process, signal.SIGKILL)
    starter.wait(timeout=60)


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a cluster, and end all of it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    for name in ("munge", "state", "spool", "log", "private"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname()
    (folder / "hosts").write_text(HOSTS.format(host=host))
    # GPUs to be counted, not to compute on: any device will do.
    gres = "NodeName=node[1-2] Name=gpu File=/dev/null\nNodeName=node[1-2] Name=gpu File=/dev/zero\n"
    (folder / "gres.conf").write_text(gres)
    # Jobs take their ports from their numbers, and clusters of tests at the same time share the network.
    values = {"folder": folder, "host": host, "ports": _free_ports(3), "first_job": random.randint(1, 50_000)}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
    # setpriv and --kill-child: when the tests' process ends, even by SIGKILL, so does everything in here.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--pid"]
    command += ["--fork", "--kill-child", "sh", "-c", START.format(folder=folder)]
    output = (folder / "log" / "start.log").open("w")
    cluster = Cluster(folder)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    with (
        output,
        subprocess.Popen(
            command,
            env=cluster.environment | {"PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ) as starter,
    ):
        try:
            cluster.wait_for_nodes(starter)
            yield cluster
        finally:
            _end(starter)
            shutil.rmtree(folder)
