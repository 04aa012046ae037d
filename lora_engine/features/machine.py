"""A folder in memory that the processes of a machine share, and which disks machines share."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from lora_engine.data.image_identity import content_digest

SHARED_MEMORY = Path("/dev/shm")
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "beegfs", "afs", "glusterfs",
    "panfs", "wekafs", "orangefs",
}
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.lxcfs"}


class MachineFolder:
    """A folder for the processes of one launch on this machine, in memory if there is /dev/shm.

    Each process holds a shared lock on it. The last one to close it removes it; if they are killed,
    the next launch does. Raises OSError.
    """

    def __init__(self, launch: str) -> None:
        try:
            import fcntl
        except ImportError:
            raise OSError("Windows has no memory that several processes share") from None
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        prefix = f"lora_engine-{os.getuid()}-"
        for stale in parent.glob(f"{prefix}*"):
            _remove_if_unused(stale)
        name = content_digest((launch or str(os.getpid())).encode()).hex()
        self.path = parent / f"{prefix}{name}"
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:  # another process has just removed it as unused
                continue
            if os.fstat(self._descriptor).st_uid != os.getuid():
                raise PermissionError(f"{self.path} belongs to someone else")
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if _is_open(self._descriptor, self.path):
                return
            os.close(self._descriptor)

    def close(self) -> None:
        import fcntl

        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # forks may have it open
        os.close(self._descriptor)
        _remove_if_unused(self.path)


def _remove_if_unused(path: Path) -> None:
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # another process uses it
        pass
    finally:
        os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def is_on_network(path: Path) -> bool:
    """Whether a folder is on a file system that several machines may use, where SQLite fails."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    path, longest, kind = Path(os.path.realpath(path)), "", ""
    for fields in map(str.split, lines):
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if len(point) >= len(longest) and path.is_relative_to(point):
            longest, kind = point, fields[fields.index("-") + 1]
    if kind == "9p":  # also the root of some containers
        return longest != "/"
    return kind in _NETWORK or kind.startswith("fuse.") and kind not in _LOCAL_FUSE
