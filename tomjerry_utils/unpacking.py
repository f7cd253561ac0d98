"""Unpack a zip or tar file of pictures that nobody vouches for.

What an archive says of itself is not trusted: names, sizes and kinds are checked, what is unpacked
is counted as it comes out, and nothing is written outside the folder given. What is refused is
named with the reason; the rest is unpacked. Memory stays bounded: members go by in pieces.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from tomjerry_utils import UserError
from tomjerry_utils.progress import progress
from tomjerry_utils.sources import IMAGE_SUFFIXES, one_line

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLE_SUFFIXES = (".csv", ".jsonl", ".txt")  # labels and licences that come with pictures
LARGEST = 512 * 2**20  # bytes that one file may unpack to
LARGEST_TOTAL = 64 * 2**30  # bytes that one archive may unpack to
# Pictures hardly shrink when packed: what unpacks to far more than it is was made to fill a disk.
MOST_GROWTH = 100  # times the archive's own size, above the first
FREE_GROWTH = 2**30  # bytes
MOST_MEMBERS = 2_000_000
_LARGEST_DIRECTORY = 256 * 2**20  # bytes of a zip's table of contents, which is read whole
_LARGEST_HEADER = 16 * 2**20  # bytes of a tar's header, likewise
_CHUNK = 2**18

_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    struct.error,
)
# A name that this system cannot hold, or whose folder is another member's file.
_BAD_NAME = {
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
}


class _Damaged(Exception):
    """A member's bytes cannot be unpacked."""


class _Refused(Exception):
    """A member is not unpacked; the message says why."""


@dataclass
class _Member:
    name: str
    reason: str  # why it is refused for what it is; empty for a plain file
    size: int  # as the archive says
    open: Callable[[], IO[bytes]]
    locked: bool = False


@dataclass
class Unpacked:
    """What became of an archive.

    Attributes:
        written: files written.
        refused: (name in the archive, reason) of what was not.
        damaged: how many of those are damaged.
    """

    written: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    damaged: int = 0


def unpack(path: Path, into: Path) -> Unpacked:
    """Write an archive's pictures and tables under `into`.

    Paths that lead out of the archive, links, devices, encrypted and damaged members, second files
    of one name (also where only upper and lower case tell them apart), names that cannot be
    written, and whatever exceeds this module's limits are refused. Other kinds of files are left
    out silently.

    Args:
        into: an existing folder; what is in it already counts as taken.

    Raises:
        UserError: neither zip nor tar, damaged as a whole, or nothing in it is whole.
    """
    made = Unpacked()
    limit = min(LARGEST_TOTAL, FREE_GROWTH + MOST_GROWTH * path.stat().st_size)
    taken: dict[str, str] = {}
    total = 0
    try:
        with progress(0, f"unpack {path.name}", unit="file") as bar:
            for number, member in enumerate(_members(path, limit)):
                bar.update()
                if number == MOST_MEMBERS:
                    more = f"refused: it and what follows are more than {MOST_MEMBERS} files"
                    made.refused.append((member.name, more))
                    break
                try:
                    parts = _parts(member)
                    if _wanted(parts):
                        _refuse_second(parts, taken)
                        total += _write(member, into.joinpath(*parts), limit - total)
                        made.written += 1
                except _Refused as error:
                    made.refused.append((member.name, f"refused: {error}"))
                except _Damaged as error:
                    made.refused.append((member.name, f"damaged in the archive: {error}"))
                    made.damaged += 1
    except (*_BROKEN, NotImplementedError) as error:
        raise UserError(
            f"{path}: damaged or locked archive ({one_line(error)}): fetch or pack it again"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(
            f"{path}: damaged archive ({one_line(error)}): fetch or pack it again"
        ) from None
    if made.damaged and not made.written:
        raise UserError(
            f"{path}: damaged or locked archive, nothing in it is whole: fetch it again"
        )
    return made


def is_archive(path: Path) -> bool:
    """True for a file that is named like an archive."""
    return path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """The name of an archive without what says that it is one."""
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] or "archive"
    return Path(name).stem


# ---- one member ----------------------------------------------------------------------------------


def _parts(member: _Member) -> Sequence[str]:
    """The parts of a member's path, if it may be written."""
    if re.match(r"[/\\]|[A-Za-z]:", member.name):
        raise _Refused("the path leads out of the archive")
    parts = PurePosixPath(member.name.replace("\\", "/")).parts
    if ".." in parts:
        raise _Refused("the path leads out of the archive")
    if member.reason:
        raise _Refused(member.reason)
    return parts


def _wanted(parts: Sequence[str]) -> bool:
    """Pictures and tables, but not the hidden files that macOS packs beside them."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    kinds = (*IMAGE_SUFFIXES, *TABLE_SUFFIXES)
    return bool(parts) and not hidden and parts[-1].lower().endswith(kinds)


def _refuse_second(parts: Sequence[str], taken: dict[str, str]) -> None:
    """Refuse what would overwrite another member, on this system or on another."""
    key = unicodedata.normalize("NFC", "/".join(parts)).casefold()
    if key not in taken:
        taken[key] = "/".join(parts)
    elif taken[key] == "/".join(parts):
        raise _Refused("a second file of this name")
    else:
        raise _Refused(f"its name differs from {taken[key]} by upper and lower case alone")


def _write(member: _Member, target: Path, room: int) -> int:
    """Unpack one member; what it has written when it is refused is removed again."""
    if member.locked:
        raise _Refused("encrypted: pack it again without a password")
    _fits(member.size, room)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _BAD_NAME:
            raise
        if isinstance(error, FileExistsError) and target.is_file():
            raise _Refused("a second file of this name") from None
        raise _Refused("its name cannot be written here") from None
    done = 0
    try:
        with file:
            for chunk in _chunks(member):
                done += len(chunk)
                _fits(done, room)
                file.write(chunk)
    except BaseException:
        target.unlink()
        raise
    return done


def _fits(size: int, room: int) -> None:
    if size > LARGEST:
        raise _Refused(f"unpacks to more than {LARGEST / 2**20:.0f} MiB")
    if size > room:
        raise _Refused("the archive unpacks to more than it may")


def _chunks(member: _Member) -> Iterator[bytes]:
    try:
        with member.open() as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except NotImplementedError as error:
        raise _Refused(f"packed in a way that cannot be read ({one_line(error)})") from None
    except RuntimeError as error:  # what zipfile raises for a password
        raise _Refused(one_line(error)) from None
    except _BROKEN as error:
        raise _Damaged(one_line(error)) from None
    except OSError as error:
        # Without a number it comes from a decompressor, not from the disk.
        if error.errno is not None:
            raise
        raise _Damaged(one_line(error)) from None


# ---- zip and tar ---------------------------------------------------------------------------------


def _members(path: Path, limit: int) -> Iterator[_Member]:
    with path.open("rb") as file:
        start = file.read(6)
    # By the first bytes: the last ones of a tar can be those of a zip in it.
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        yield from _zip_members(path)
    elif _is_tar(path, start):
        yield from _tar_members(path, start, limit)
    elif zipfile.is_zipfile(path):
        yield from _zip_members(path)
    else:
        raise UserError(f"{path}: neither a zip nor a tar file: give one of those, or a folder")


def _zip_members(path: Path) -> Iterator[_Member]:
    if _directory_size(path) > _LARGEST_DIRECTORY:
        raise UserError(f"{path}: names too many files: pack them into several archives")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            reason = "a link" if kind == stat.S_IFLNK else "not a plain file"
            if kind in (0, stat.S_IFREG):
                reason = ""

            def opened(info: zipfile.ZipInfo = info) -> IO[bytes]:
                return archive.open(info)

            locked = bool(info.flag_bits & 0x1)
            yield _Member(_zip_name(info), reason, info.file_size, opened, locked)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name; many packers write UTF-8 and do not say so."""
    if not info.flag_bits & 0x800:
        try:
            return info.filename.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return info.filename


def _directory_size(path: Path) -> int:
    """Bytes of a zip's table of contents as its last record says, 0 where there is none."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 2**16 - 98))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 16 > len(tail):
        return 0
    (found,) = struct.unpack_from("<L", tail, at + 12)
    if found == 0xFFFFFFFF and at >= 76 and tail[at - 76 : at - 72] == b"PK\6\6":
        (found,) = struct.unpack_from("<Q", tail, at - 36)
    return int(found)


class _Bounded:
    """A stream that refuses to be read in one piece: tarfile reads long headers whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell, self.close = stream.seek, stream.tell, stream.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError("a header that is far too long")
        return self._stream.read(size)


def _open_tar(path: Path, start: bytes) -> tuple[tarfile.TarFile, bool]:
    """An open tar, and whether it is compressed."""
    packed = True
    stream: Any
    if start[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(path)
    elif start[:3] == b"BZh":
        stream = bz2.BZ2File(path)
    elif start == b"\xfd7zXZ\0":
        stream = lzma.LZMAFile(path)  # noqa: SIM115 (closed with the archive)
    else:
        stream, packed = path.open("rb"), False
    try:
        # Plain "r:", so that nothing but this module chooses how it is read.
        return tarfile.open(fileobj=cast(IO[bytes], _Bounded(stream)), mode="r:"), packed
    except BaseException:
        stream.close()
        raise


def _is_tar(path: Path, start: bytes) -> bool:
    try:
        archive, _ = _open_tar(path, start)
    except (*_BROKEN, OSError):
        return False
    _close(archive)
    return True


def _close(archive: tarfile.TarFile) -> None:
    stream = cast(Any, archive.fileobj)
    archive.close()
    stream.close()


def _tar_members(path: Path, start: bytes, limit: int) -> Iterator[_Member]:
    archive, packed = _open_tar(path, start)
    try:
        while (member := archive.next()) is not None:
            # tarfile keeps every member that it has met; these are not asked for again.
            archive.members.clear()  # type: ignore[attr-defined]
            if packed and archive.offset > limit + _LARGEST_HEADER:
                # Even what is skipped must be decompressed.
                reason = "it and what follows unpack to more than they may"
                yield _Member(member.name, reason, member.size, lambda: cast(Any, None))
                return
            if member.isdir():
                continue
            reason = "" if member.isfile() else "not a plain file"
            if member.issym() or member.islnk():
                reason = "a link"

            def opened(member: tarfile.TarInfo = member) -> IO[bytes]:
                stream = archive.extractfile(member)
                if stream is None:
                    raise tarfile.ReadError("no bytes")
                return stream

            yield _Member(member.name, reason, member.size, opened)
        # At a damaged header tarfile ends as it does at the end of the archive, which is zeros.
        stream = cast(Any, archive.fileobj)
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("ends in the middle")
        # The sum of a compressed file stands behind the zeros that fill it up.
        for _ in range(64):
            if not stream.read(_CHUNK):
                break
    finally:
        _close(archive)
