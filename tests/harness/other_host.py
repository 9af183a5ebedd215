"""Locks of processes of another host."""

from harness.system import locks


def elsewhere(file, host="another-host", pid=1):
    """A lock file of a process of another host, as filelock writes it."""
    lines = ["filelock/2", f"pid={pid}", f"host={host}", "mode=lease", "token=0123", f"duration={locks.LEASE!r}"]
    file.write_text("\n".join(lines) + "\n")
