"""A real Slurm on this machine alone, from Debian's packages: munge, slurmctld and slurmd, as root, in a folder of their own."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={controller}
SlurmdPort={node}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=10
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """Programs that are not here."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@contextmanager
def slurm(folder: Path, cpus: int = 2):
    """The cluster, while it is entered; SLURM_CONF names it for whatever is started meanwhile."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(folder=folder, host=host, controller=_port(), node=_port(), cpus=cpus, memory=memory * 9 // 10)
    )
    before = dict(os.environ)
    os.environ |= {"SLURM_CONF": str(config), "PATH": f"{before['PATH']}:/usr/sbin:/sbin"}
    started = []
    try:
        munge = ["--key-file", key, "--socket", folder / "munge.socket", "--log-file", folder / "munge" / "log"]
        munge += ["--pid-file", folder / "munge" / "pid", "--seed-file", folder / "munge" / "seed"]
        started.append(_start(["munged", "--foreground", "--force", *munge], folder / "munge" / "out"))
        _until(lambda: (folder / "munge.socket").exists(), "munged", folder / "munge" / "out")
        started.append(_start(["slurmctld", "-D"], folder / "slurmctld.out"))
        started.append(_start(["slurmd", "-D", "-N", host], folder / "slurmd.out"))
        _until(
            lambda: "idle" in _ask("sinfo", "--noheader", "--format=%T"), "a node that is idle", folder / "slurmd.log"
        )
        yield config
    finally:
        subprocess.run(["scancel", "--me"], check=False, capture_output=True)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        os.environ.clear()
        os.environ.update(before)


def _start(words, log):
    assert pwd.getpwuid(os.getuid()).pw_name == "root", "slurmd is run by root"
    with log.open("w") as out:
        return subprocess.Popen([str(word) for word in words], stdout=out, stderr=out)


def _ask(*words) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _until(true, what, log, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what}: {log.read_text()[-2000:] if log.exists() else 'it has no log'}")
        time.sleep(0.2)
