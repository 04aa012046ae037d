"""The members of a tar archive, from its headers alone: ustar, GNU, pax and old (v7) ones.

tarfile takes several times as long, and ends without an error at a damaged header. Here the search
continues behind the damage. Formats: https://www.gnu.org/software/tar/manual/html_node/Standard.html
and https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html.
"""

import functools
import os
import re
import shlex
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lora_engine.data.formats.text_files import COMPRESSIONS, open_file
from lora_engine.data.rows import AnnotationError, shown_value

BLOCK = 512
WINDOW = 4096  # bytes: behind an image usually its caption, its metadata and the next header
SEARCH_CHUNK = 1 << 20
MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records
MAX_PADDING = 1 << 20  # zeros at the end of an archive; tar writes up to 10,240 by default
# Name, size, its end, checksum, type, first byte of the prefix.
unpack_header = struct.Struct("100s 24x 11s B 12x 8s B 188x B 166x").unpack
unpack_signed = struct.Struct("148b 8x 356b").unpack
FILE, EXTENSION = "file", "extended header"
KINDS = {
    ord(code): kind for code, kind in {
        "\0": FILE, "0": FILE, "7": FILE, "1": "hard link", "2": "symbolic link",
        "3": "character device", "4": "block device", "5": "directory", "6": "named pipe",
        "D": "directory", "V": "volume label", "S": "sparse file", "x": EXTENSION, "X": EXTENSION,
        "g": EXTENSION, "L": EXTENSION, "K": EXTENSION,
    }.items()
}
PLAIN = ord("0")
WITHOUT_DATA = frozenset(b"123456")
SPARSE, GLOBAL, LONG_NAME, LONG_LINK = b"SgLK"
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
LFS_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True)
class NotAFile:
    """A member that is no plain file, and what it is; its data is skipped."""

    name: str
    kind: str


@dataclass(frozen=True)
class Gap:
    """Bytes from `start` to `end` of the archive from which no member can be read, and why."""

    start: int
    end: int
    reason: str


class Archive:
    """An open file, of which small neighbouring pieces are read together."""

    def __init__(self, path: str) -> None:
        """Raises AnnotationError for what is not a readable, regular file."""
        self.path = path
        self._file = open_file(path).detach()  # no buffer besides the window
        self.size = os.fstat(self._file.fileno()).st_size
        self._window, self._start = b"", 0

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; less at the end of the file. Raises AnnotationError."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._window):
            try:
                # Not memory-mapped: if the file is cut meanwhile, that would kill the process.
                self._file.seek(offset)
                self._window = self._file.read(max(size, WINDOW))
            except OSError as error:
                raise AnnotationError(
                    f"{self.path}: cannot be read at byte {offset:,}: {error.strerror}"
                ) from None
            self._start, begin = offset, 0
            if len(self._window) < min(size, self.size - offset):
                raise AnnotationError(
                    f"{self.path}: became shorter while it was read ({self.size:,} bytes before)"
                )
        return self._window[begin:begin + size]


def check_is_tar(archive: Archive) -> None:
    """Raises AnnotationError for what is not an uncompressed tar."""
    path = archive.path
    if not archive.size:
        raise AnnotationError(f"{path}: the file is empty, expected a tar archive")
    head = archive.read(0, BLOCK)
    if parse_header(head) is not None:
        return
    for magic, (name, command) in COMPRESSIONS.items():
        if head.startswith(magic):
            raise AnnotationError(
                f"{path}: compressed with {name}, and images in it cannot be read in random order: "
                f"decompress it with {command} < {shlex.quote(path)} > NEW.tar"
            )
    if head.startswith(LFS_POINTER):
        raise AnnotationError(
            f"{path}: only a pointer of Git LFS: download the file itself with git lfs pull"
        )
    end, is_padding = next_header(archive, 0)
    if end == archive.size and not is_padding:
        raise AnnotationError(
            f"{path}: not a tar archive (it begins with {shown_value(head[:16].decode('latin-1'))})"
        )


def members(archive: Archive) -> Iterator[tuple[str, int, int] | NotAFile | Gap]:
    """(name, offset, size) of the files, in their order; their data is not read.

    A missing end marker is accepted, because some programs do not write it. Raises AnnotationError.
    """
    position, file_size = 0, archive.size
    defaults: dict[str, str] = {}  # from global pax headers
    extended: dict[str, str] = {}  # from the extended headers before a member
    while position < file_size:
        header = parse_header(archive.read(position, BLOCK))
        if header is None:
            end, is_padding = next_header(archive, position)
            if extended or not is_padding:
                yield Gap(position, end, "no valid header")
            position, extended = end, {}
            continue
        name, code, size = header
        offset = position + BLOCK
        if code == PLAIN and not (extended or defaults) and 0 <= size <= file_size - offset:
            position = offset + size + -size % BLOCK
            yield name, offset, size
            continue
        kind = KINDS.get(code)
        if kind is None:
            kind = f"member of the unknown type {chr(code)!r}"
        elif code in WITHOUT_DATA:
            size = 0
        elif code == SPARSE:
            offset = _end_of_sparse_header(archive, position)
        if (extended or defaults) and kind != EXTENSION:
            fields = {**defaults, **extended}
            name, kind = fields.get("path", name), extended.get("kind", kind)
            size = int(fields.get("size", size)) if code not in WITHOUT_DATA else 0
            extended = {}
        if not 0 <= size <= file_size - offset:
            end, _ = next_header(archive, min(offset, file_size))
            yield Gap(
                position, end,
                f"{kind} {shown_value(name)} has {size:,} bytes at byte {offset:,}, but the file "
                f"has {file_size:,} in all",
            )
            position, extended = end, {}
            continue
        position = offset + size + -size % BLOCK
        if kind == FILE:
            yield name, offset, size
        elif code == GLOBAL:
            defaults |= _extension(archive, code, offset, size)
        elif kind == EXTENSION:
            extended |= _extension(archive, code, offset, size)
        else:
            yield NotAFile(name, kind)
    if extended:
        yield Gap(file_size, file_size, "an extended header without its member")


def parse_header(block: bytes) -> tuple[str, int, int] | None:
    """(name, type, size) of a header's 512 bytes; None if its checksum is wrong."""
    try:
        name, digits, end, checksum, code, prefix = unpack_header(block)
        if zlib.adler32(block) & 0xFFFF != _adler(checksum):
            # Old programs added the bytes as signed numbers.
            if sum(unpack_signed(block)) + 8 * ord(" ") != _number(checksum):
                return None
        # Twelve digits, or a binary number, where eleven digits and an end do not suffice.
        is_plain = digits.isdigit() and end in (0, 32)
        size = int(digits, 8) if is_plain else _number(block[124:136])
    except (ValueError, struct.error):  # no number; cut off
        return None
    name = name.partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU's headers have times there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    if not code and name.endswith(b"/"):  # before ustar, directories had no type
        code = ord("5")
    return name.decode("utf-8", "surrogateescape"), code, size


@functools.lru_cache(4096)
def _adler(checksum: bytes) -> int:
    """The lower half of Adler-32 of a header with this checksum. Raises ValueError.

    It is 1 + the sum of the bytes mod 65521, and much faster than sum(). In the checksum, its own
    eight bytes count as spaces.
    """
    return (1 + _number(checksum) - 8 * ord(" ") + sum(checksum)) % 65521


def _number(field: bytes) -> int:
    """Octal digits, or where they do not suffice a binary number. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _end_of_sparse_header(archive: Archive, position: int) -> int:
    """Where the data of an old GNU sparse file begins: behind the blocks of its map."""
    has_more = archive.read(position, BLOCK)[482]
    position += BLOCK
    while has_more and position + BLOCK <= archive.size:
        has_more = archive.read(position, BLOCK)[504]
        position += BLOCK
    return position


def _extension(archive: Archive, code: int, offset: int, size: int) -> dict[str, str]:
    """What an extended header states about a member: "path", "size", "kind" of what is unusable."""
    damaged = {"kind": "file with a damaged extended header"}
    if size > MAX_EXTENSION:
        return damaged
    data = archive.read(offset, size)
    if code == LONG_LINK:
        return {}
    if code == LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found = {}
    while data and data[0]:
        record = PAX_RECORD.match(data)
        if record is None or not data[:int(record[1])].endswith(b"\n"):
            return damaged
        keyword, value = record[2], data[record.end():int(record[1]) - 1]
        data = data[int(record[1]):]
        if keyword == b"path" and value:
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                return damaged
            found["size"] = value.decode()
        elif keyword.startswith(b"GNU.sparse."):
            found["kind"] = "sparse file"
    return found


def next_header(archive: Archive, start: int) -> tuple[int, bool]:
    """Search behind `start` -> (where the next header is, or the file's end; is it all padding?).

    Zeros are padding behind the last member, and between archives of which one was appended to the
    other. A download that was interrupted may leave many more of them.
    """
    position, is_zero, size = start, True, WINDOW
    while position < archive.size:
        chunk = archive.read(position, size)
        end = _first_header(chunk)
        is_zero = is_zero and not chunk[:end].strip(b"\0")
        if end is not None:
            return position + end, is_zero and position + end - start >= 2 * BLOCK
        if position + len(chunk) >= archive.size:
            break
        position += len(chunk) - BLOCK + 1
        size = SEARCH_CHUNK
    return archive.size, is_zero and archive.size - start <= MAX_PADDING


def _first_header(chunk: bytes) -> int | None:
    """Where the first header with a magic number is, at any byte: bytes may have been lost."""
    found = chunk.find(b"ustar")
    while found >= 0:
        begin = found - 257
        if begin >= 0 and parse_header(chunk[begin:begin + BLOCK]) is not None:
            return begin
        found = chunk.find(b"ustar", found + 1)
    return None
