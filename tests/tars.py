"""Tar archives for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(
    path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]], *,
    format: int = tarfile.USTAR_FORMAT,
) -> None:
    """Write samples, each a key and the data of its fields, as KEY.FIELD."""
    with tarfile.open(path, "w", format=format) as archive:
        for key, fields in samples:
            for field, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
