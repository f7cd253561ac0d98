"""Archives: hostile ones, damaged ones, interrupted ones; published sets by their layouts."""

from __future__ import annotations

import io
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_server import File, serving

from tomjerry_utils import (
    UserError,
    animal_masks,
    archives,
    collect,
    photo_sets,
    sources,
    unpacking,
)
from tomjerry_utils.unpacking import unpack

Members = list[tuple[str, bytes]]


def picture(seed: int) -> bytes:
    """A PNG that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse.repeat(6, 0).repeat(6, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pack(path: Path, members: Members) -> Path:
    """A zip or tar, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return path
    kind = path.suffix[1:]
    with tarfile.open(path, f"w:{kind}" if kind in ("gz", "bz2", "xz") else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpacked(path: Path) -> tuple[list[str], dict[str, str]]:
    """What `unpack` wrote, and what it refused with the reasons."""
    into = path.parent / f"{path.name}-unpacked"
    into.mkdir()
    before = {p for p in path.parent.rglob("*") if into not in (p, *p.parents)}
    made = unpack(path, into)
    assert {p for p in path.parent.rglob("*") if into not in (p, *p.parents)} == before
    written = sorted(p.relative_to(into).as_posix() for p in into.rglob("*") if p.is_file())
    assert len(written) == made.written
    assert not any(p.is_symlink() for p in into.rglob("*"))
    return written, dict(made.refused)


def gathered(out: Path, **arguments: Any) -> collect.Collection:
    return collect.collect_command(out, short_side=32, screen=False, **arguments)


# ---- what must not be written --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_cannot_write_elsewhere(tmp_path: Path, kind: str) -> None:
    good, path = picture(5), tmp_path / f"pack.{kind}"
    out = [
        *("../escaped.png", "/tmp/escaped-absolute.png", "C:\\escaped.png", "c:escaped.png"),
        *("a/../../escaped.png", "..\\escaped.png", "\\\\host\\share\\escaped.png", ".."),
    ]
    pack(path, [("mouse/good.png", good), *((name, good) for name in out)])
    before = set(tmp_path.rglob("*"))
    made = gathered(tmp_path / "out", archives=[str(path)], domain="natural")
    outside = {p for p in tmp_path.rglob("*") if (tmp_path / "out") not in (p, *p.parents)}
    assert outside == before
    assert not Path("/tmp/escaped-absolute.png").exists()
    kept = made.select()
    assert [(row["origin"], row["label"]) for row in kept] == [("mouse/good.png", "mouse")]
    refused = {row["origin"]: row["reason"] for row in made.rows if not row["kept"]}
    reason = "refused: the path leads out of the archive"
    assert refused == dict.fromkeys(out, reason)


def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path) -> None:
    kinds = {
        "soft.png": tarfile.SYMTYPE,
        "hard.png": tarfile.LNKTYPE,
        "char.png": tarfile.CHRTYPE,
        "block.png": tarfile.BLKTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "folder": tarfile.SYMTYPE,
    }
    path = tmp_path / "pack.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../"
            archive.addfile(member)
        # Behind a link of this name it would land two folders up.
        for name in ("folder/behind.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"good"))
    written, refused = unpacked(path)
    assert written == ["folder/behind.png", "good.png"]
    assert {name: refused.pop(name) for name in ("soft.png", "hard.png", "folder")} == (
        dict.fromkeys(("soft.png", "hard.png", "folder"), "refused: a link")
    )
    assert refused == dict.fromkeys(
        ("char.png", "block.png", "pipe.png"), "refused: not a plain file"
    )


def test_links_and_devices_of_a_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, mode in (
            ("link.png", stat.S_IFLNK | 0o777),
            ("pipe.png", stat.S_IFIFO | 0o666),
            ("device.png", stat.S_IFBLK | 0o666),
            ("plain.png", stat.S_IFREG | 0o644),
        ):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
    written, refused = unpacked(path)
    assert written == ["plain.png"]
    assert refused == {
        "link.png": "refused: a link",
        "pipe.png": "refused: not a plain file",
        "device.png": "refused: not a plain file",
    }


# ---- bombs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_many_small_members_cannot_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(unpacking, "FREE_GROWTH", 50_000)
    monkeypatch.setattr(unpacking, "MOST_GROWTH", 1)
    path = pack(tmp_path / f"pack.{kind}", [(f"{i}.png", bytes(10_000)) for i in range(40)])
    room = 50_000 + path.stat().st_size
    written, refused = unpacked(path)
    assert written == [f"{i}.png" for i in range(room // 10_000)]
    more = [reason for reason in refused.values() if "more than" in reason]
    assert more == list(refused.values())
    if kind == "zip":
        assert len(written) + len(refused) == 40
    # Pictures hardly shrink: the same number of real ones is no bomb.
    monkeypatch.setattr(unpacking, "FREE_GROWTH", 0)
    monkeypatch.setattr(unpacking, "MOST_GROWTH", 3)
    real = pack(tmp_path / f"real.{kind}", [(f"{i}.png", picture(i)) for i in range(40)])
    assert len(unpacked(real)[0]) == 40


def test_a_large_member_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "LARGEST", 20_000)
    members = [("big.png", bytes(30_000)), ("small.png", bytes(10_000))]
    for kind in ("zip", "tar"):
        written, refused = unpacked(pack(tmp_path / f"pack.{kind}", members))
        assert written == ["small.png"]
        assert list(refused) == ["big.png"]
        assert "more than" in refused["big.png"]


def test_a_size_that_lies_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "LARGEST", 20_000)
    path = pack(tmp_path / "pack.zip", [("lies.png", bytes(10**6)), ("good.png", b"good")])
    content = bytearray(path.read_bytes())
    told = struct.pack("<L", 10**6)
    assert content.count(told) == 2  # beside the file and in the table of contents
    path.write_bytes(content.replace(told, struct.pack("<L", 4)))
    written, refused = unpacked(path)
    assert written == ["good.png"]
    assert refused["lies.png"].startswith("damaged in the archive")


def test_a_tar_of_zeros_is_left_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what is skipped must be decompressed: that has an end as well."""
    monkeypatch.setattr(unpacking, "FREE_GROWTH", 10**6)
    monkeypatch.setattr(unpacking, "_LARGEST_HEADER", 10**6)
    monkeypatch.setattr(unpacking, "MOST_GROWTH", 1)
    members = [("a.png", picture(1)), ("zeros.bin", bytes(10**7)), ("b.png", picture(2))]
    written, refused = unpacked(pack(tmp_path / "pack.tar.gz", members))
    assert written == ["a.png"]
    assert list(refused) == ["zeros.bin"]


def test_memory_stays_small(tmp_path: Path) -> None:
    members = [("large.png", bytes(30_000_000)), *((f"{i}.bin", b"") for i in range(1000))]
    for kind in ("zip", "tar.gz"):
        path = pack(tmp_path / f"pack.{kind}", members)
        (tmp_path / kind).mkdir()
        tracemalloc.start()
        unpack(path, tmp_path / kind)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 10_000_000, kind


def test_a_header_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    """The long name of a member is read whole, however long it says it is."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10**9
    path = put(tmp_path / "pack.tar.gz", b"")
    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = pack(tmp_path / "start.tar", [("a.png", picture(1))]).read_bytes()[:1024]
    path.write_bytes(stream.compress(start + header.tobuf()) + stream.flush())
    tracemalloc.start()
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError, match="far too long"):
        unpack(path, tmp_path / "into")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6_000_000


def test_too_many_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "pack.zip", [(f"{i}.png", picture(i)) for i in range(9)])
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 5)
    written, refused = unpacked(path)
    assert (len(written), list(refused)) == (5, ["5.png"])
    monkeypatch.setattr(unpacking, "_LARGEST_DIRECTORY", 400)
    with pytest.raises(UserError, match="too many files"):
        unpack(path, tmp_path)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_second_files_of_a_name_are_refused(tmp_path: Path, kind: str) -> None:
    names = ["a.png", "./a.png", "A.PNG", "ü.png", "u\u0308.png", "b.png/inside.png", "b.png"]
    path = pack(tmp_path / f"pack.{kind}", [(name, picture(i)) for i, name in enumerate(names)])
    written, refused = unpacked(path)
    assert written == ["a.png", "b.png/inside.png", "ü.png"]
    assert refused["./a.png"] == "refused: a second file of this name"
    assert refused["A.PNG"] == "refused: its name differs from a.png by upper and lower case alone"
    assert "ü.png" in refused["u\u0308.png"]
    assert refused["b.png"] == "refused: its name cannot be written here"


def test_names_in_other_alphabets(tmp_path: Path) -> None:
    path = tmp_path / "pack.zip"
    names = ["Kätzchen.png", "mouse/ねずみ.png"]
    pack(path, [(name, picture(i)) for i, name in enumerate(names)])
    assert unpacked(path)[0] == sorted(names)
    # Without the flag that says UTF-8, as many packers write it; and in cp437, as the norm says.
    content = bytearray(path.read_bytes())
    for start in (b"PK\3\4", b"PK\1\2"):
        offset = 6 if start == b"PK\3\4" else 8
        at = content.find(start)
        while at >= 0:
            content[at + offset + 1] &= ~0x08 & 0xFF
            at = content.find(start, at + 1)
    plain = put(tmp_path / "plain.zip", bytes(content))
    with zipfile.ZipFile(plain) as archive:
        assert not any(info.flag_bits & 0x800 for info in archive.infolist())
    assert unpacked(plain)[0] == sorted(names)
    old = bytes(content).replace("Kätzchen".encode(), "K\u00e4tzchen!".encode("cp437"))
    assert unpacked(put(tmp_path / "old.zip", old))[0] == sorted(["Kätzchen!.png", names[1]])
    raw = tmp_path / "raw.tar"
    with tarfile.open(raw, "w") as archive:
        member = tarfile.TarInfo("caf\udce9.png")  # bytes that are no UTF-8
        member.size = len(picture(1))
        archive.addfile(member, io.BytesIO(picture(1)))
    row = gathered(tmp_path / "out", archives=[str(raw)], domain="natural").rows[0]
    assert (row["kept"], row["origin"]) == (True, r"caf\udce9.png")


def test_a_name_too_long_is_one_row(tmp_path: Path) -> None:
    members = [("n" * 300 + ".png", picture(1)), ("good.png", picture(2))]
    written, refused = unpacked(pack(tmp_path / "pack.tar", members))
    assert written == ["good.png"]
    assert list(refused.values()) == ["refused: its name cannot be written here"]


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    names = ["__MACOSX/._a.png", "._a.png", ".git/a.png", "notes.doc", "a.png", "labels.csv"]
    written, refused = unpacked(pack(tmp_path / "pack.zip", [(n, picture(1)) for n in names]))
    assert (written, refused) == (["a.png", "labels.csv"], {})


# ---- locked and damaged --------------------------------------------------------------------------


def flag_encrypted(path: Path, name: str) -> None:
    """Say of one member of a zip that it is encrypted, as the norm says it."""
    content = bytearray(path.read_bytes())
    for start, flags, names in ((b"PK\3\4", 6, 30), (b"PK\1\2", 8, 46)):
        at = content.find(start)
        while at >= 0:
            if content[at + names :].startswith(name.encode()):
                content[at + flags] |= 1
            at = content.find(start, at + 1)
    path.write_bytes(content)


def test_encrypted_members_are_rows(tmp_path: Path) -> None:
    path = pack(tmp_path / "pack.zip", [("secret.png", picture(1)), ("open.png", picture(2))])
    flag_encrypted(path, "secret.png")
    made = gathered(tmp_path / "out", archives=[str(path)], domain="natural")
    assert {row["origin"]: row["reason"] for row in made.rows} == {
        "secret.png": "refused: encrypted: pack it again without a password",
        "open.png": "",
    }
    # Where all are refused the run goes on, and other sources are collected.
    flag_encrypted(path, "open.png")
    put(tmp_path / "cat" / "c.png", picture(3))
    made = gathered(
        tmp_path / "out2", archives=[str(path)], folders=[str(tmp_path / "cat")], domain="natural"
    )
    assert sorted((row["origin"], row["kept"]) for row in made.rows) == [
        ("c.png", True),
        ("open.png", False),
        ("secret.png", False),
    ]


def test_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = pack(tmp_path / "pack.zip", [("a.png", picture(1))])
    content = bytearray(path.read_bytes())
    content[60:100] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pack\.zip: damaged"):
        gathered(tmp_path / "out", archives=[str(path)])
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        gathered(tmp_path / "out", archives=[str(tmp_path / "text.zip")])
    with pytest.raises(UserError, match="holds no pictures"):
        gathered(tmp_path / "out", archives=[str(pack(tmp_path / "no.zip", [("a.doc", b"")]))])


def test_one_damaged_member_is_a_row(tmp_path: Path) -> None:
    path = pack(tmp_path / "pack.zip", [("a.png", picture(1)), ("b.png", picture(2))])
    content = bytearray(path.read_bytes())
    content[60:100] = bytes(40)
    path.write_bytes(content)
    written, refused = unpacked(path)
    assert written == ["b.png"]
    assert refused["a.png"].startswith("damaged in the archive: ")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_a_cut_archive_is_never_half_used(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / f"pack.{kind}", [(f"{i}.png", picture(i)) for i in range(9)])
    whole = path.read_bytes()
    cuts = [len(whole) // 2, len(whole) - 9] if kind != "tar" else [1024, 1536, 5000, 9 * 1024]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"pack.{kind}: (damaged|neither)"):
            gathered(tmp_path / "out", archives=[str(path)], domain="natural")
    path.write_bytes(whole)
    made = gathered(tmp_path / "out", archives=[str(path)], domain="natural")
    assert [row["kept"] for row in made.rows] == [True] * 9


@pytest.mark.parametrize("kind", ["gz", "plain"])
def test_a_damaged_tar_does_not_end_early_in_silence(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / "pack.tar", [(f"{i}.png", picture(i)) for i in range(9)])
    content = bytearray(path.read_bytes())
    if kind == "plain":
        at = content.find(b"5.png")
        content[at + 100 : at + 120] = b"x" * 20  # a header whose sum is wrong
    else:
        packed = bytearray(zlib.compress(bytes(content), wbits=31))
        packed[-8] ^= 1  # the sum of the whole, behind the last byte that a tar needs
        content = packed
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        unpack(path, tmp_path)


def test_zip64_and_kinds_by_content(tmp_path: Path) -> None:
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("large.png")
        with archive.open(info, "w", force_zip64=True) as stream:
            stream.write(picture(1))
    assert unpacked(path) == (["large.png"], {})
    # A tar whose last bytes are those of a zip is a tar all the same, whatever its name.
    inner = path.read_bytes()
    outer = pack(tmp_path / "outer.tar", [("a.png", picture(2)), ("inner.zip", inner)])
    assert zipfile.is_zipfile(outer)
    assert unpacked(outer.rename(tmp_path / "outer.zip")) == (["a.png"], {})
    # A zip behind a program that unpacks it.
    selfmade = put(tmp_path / "setup.exe", b"MZ" + bytes(2000) + inner)
    assert unpacked(selfmade)[0] == ["large.png"]


def test_the_length_of_a_table_of_contents_in_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(9)]
    plain = pack(tmp_path / "plain.zip", members)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # as if there were 65 536
    path = pack(tmp_path / "pack.zip", members)
    content = bytearray(path.read_bytes())
    assert b"PK\6\6" in content
    assert b"PK\6\6" not in plain.read_bytes()
    at = content.rfind(b"PK\5\6")
    content[at + 12 : at + 16] = b"\xff" * 4  # look into the larger record
    path.write_bytes(content)
    assert unpacking._directory_size(path) == unpacking._directory_size(plain) > 9 * 46
    assert len(unpacked(path)[0]) == 9
    assert unpacking._directory_size(put(tmp_path / "no.zip", b"PK\5\6")) == 0


# ---- interrupted ---------------------------------------------------------------------------------


def test_an_interrupted_unpacking_is_begun_anew(tmp_path: Path) -> None:
    path = pack(tmp_path / "pack.tar", [(f"cat/{i}.png", picture(i)) for i in range(9)])
    arguments = (
        f"Path({str(tmp_path / 'out')!r}), archives=[{str(path)!r}], domain='natural', screen=False"
    )
    call = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tomjerry_utils import collect, unpacking\n"
        "write, left = unpacking._write, 5\n"
        "def last(*a):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*a)\n"
        "unpacking._write = last\n"
        f"collect.collect_command({arguments})"
    )
    ended = subprocess.run([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    left = list((tmp_path / "out").rglob("*.png"))
    assert len(left) == 4
    left[0].write_bytes(b"torn")
    made = gathered(tmp_path / "out", archives=[str(path)], domain="natural")
    assert len(made.select()) == 9


def test_a_finished_unpacking_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "pack.tar", [("a.png", picture(1)), ("../b.png", b"")])
    options = sources.Options(tmp_path / "work")
    first = archives.unpacked(str(path), options)
    monkeypatch.setattr(archives, "unpack", lambda *a: pytest.fail("unpacked again"))
    assert archives.unpacked(str(path), options) == first
    assert [row["origin"] for row in first[1]] == ["../b.png"]


# ---- from the web --------------------------------------------------------------------------------


def test_an_archive_from_the_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(archives, "data_root", lambda: tmp_path / "data")
    path = pack(tmp_path / "cats.zip", [(f"cat/{i}.png", picture(i)) for i in range(5)])
    with serving() as web:
        web.files["/sets/cats.zip"] = File(path.read_bytes(), breaks=[path.stat().st_size // 2])
        monkeypatch.setattr("tomjerry_utils.downloads.PAUSE_S", 0.0)
        address = f"{web.address}/sets/cats.zip"
        made = gathered(tmp_path / "out", archives=[address], domain="natural")
        again = gathered(tmp_path / "out2", archives=[address], domain="natural")
        assert len(web.requests) == 2  # the second goes on, the second call asks for nothing
    assert [row["label"] for row in made.rows] == ["cat"] * 5
    assert made.rows == again.rows
    assert made.rows == gathered(tmp_path / "out3", archives=[str(path)], domain="natural").rows
    assert [p.name for p in (tmp_path / "data" / "raw").rglob("*.zip")] == ["cats.zip"]


# ---- published sets ------------------------------------------------------------------------------


def pets(root: Path) -> Path:
    """The layout of the Oxford-IIIT Pet set, in small, in its two archives."""
    trimap = np.full((30, 30), 2, np.uint8)
    trimap[5:20, 5:20], trimap[8:17, 8:17] = 3, 1
    buffer = io.BytesIO()
    Image.fromarray(trimap).save(buffer, "PNG")
    names = ["Maine_Coon_1", "Maine_Coon_2", "Abyssinian_100", "beagle_1"]
    images = [(f"images/{name}.jpg", picture(i)) for i, name in enumerate(names)]
    pack(root / "images.tar.gz", [*images, ("images/Abyssinian_100.mat", b"")])
    trimaps = [(f"annotations/trimaps/{name}.png", buffer.getvalue()) for name in names[1:]]
    extra = [("annotations/trimaps/._Maine_Coon_2.png", b"junk"), ("annotations/list.txt", b"")]
    pack(root / "annotations.tar.gz", [*trimaps, *extra])
    return root


def test_pets_are_cats_with_masks(tmp_path: Path) -> None:
    made = gathered(tmp_path / "out", archives=[str(pets(tmp_path / "pets"))])
    rows = {row["origin"]: row for row in made.select()}
    assert len(rows) == len(made.rows) == 3
    assert {row["label"] for row in made.rows} == {"cat"}
    assert all("Parkhi" in row["rights"] for row in made.rows)
    with_mask = rows["images/Maine_Coon_2.jpg"]
    assert with_mask["mask"].startswith("masks/")
    mask = animal_masks.finder(made.folder, net=False)(with_mask)
    assert mask.shape == made.images([with_mask], 30)[0].shape[:2]
    assert (mask[0, 0], mask[12, 12]) == (0.0, 1.0)
    assert 0.3 < mask[6, 12] < 0.7  # the outline, which the set leaves open
    assert rows["images/Maine_Coon_1.jpg"]["mask"] == ""
    with pytest.raises(UserError, match="no mask"):
        animal_masks.finder(made.folder, net=False)(rows["images/Maine_Coon_1.jpg"])
    masks = sorted(p.name for p in (tmp_path / "out" / "masks").iterdir())
    assert len(masks) == 2
    # The scratch folder is gone; the masks are not.
    assert not (tmp_path / "out" / ".work").exists()


def mice(names: list[str]) -> list[str]:
    return photo_sets.mouse_groups([PurePosixPath(name) for name in names])


def test_mice_are_grouped_by_animal_where_names_tell() -> None:
    assert mice(["KXN/mouse07/d1/001.jpg", "KXN/mouse 7/d2/900.jpg", "IN/mouse07/1.jpg"]) == [
        "KXN/animal 7",
        "KXN/animal 7",
        "IN/animal 7",
    ]
    assert mice(["C/animal_12_30min_0004.jpg", "C_animal12_0099.jpg"]) == ["C/animal 12"] * 2
    # A number that counts pictures is no animal.
    assert mice([f"KXN/mouse_{i}.jpg" for i in range(3)]) == ["KXN/run 0"] * 3


def test_other_mice_are_grouped_by_runs() -> None:
    names = [f"KXN/{'before' if i % 2 else 'after'}-x/{i}.jpg" for i in range(600)]
    groups = mice(names)
    assert {groups.count(group) for group in groups} <= {256, 88}
    assert len(set(groups)) == 3
    # Neighbours in the order of their numbers, 2 before 10, are neighbours in a group.
    tens = [f"C/{i}.jpg" for i in range(1000)]
    assert mice(tens) == [f"C/run {i // photo_sets.SAME_SITTING}" for i in range(1000)]
    assert mice(["C_1.jpg", "IN_1.jpg", "1.jpg"]) == ["C/run 0", "IN/run 0", "all/run 0"]


def test_mice_from_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [
        (f"{subset}/{subset}_{i:05d}.png", picture(100 * n + i))
        for n, subset in enumerate(photo_sets.MOUSE_SUBSETS)
        for i in range(4)
    ]
    path = pack(tmp_path / "black_mice_dataset_v1.zip", members)
    made = gathered(tmp_path / "out", archives=[str(path)])
    assert {row["label"] for row in made.rows} == {"mouse"}
    assert all(row["kept"] and "Andresen" in row["rights"] for row in made.rows)
    assert {row["group"] for row in made.rows} == {
        f"mice/{subset}/run 0" for subset in photo_sets.MOUSE_SUBSETS
    }
    assert "tell no animal by their names" in capsys.readouterr().err
    sheet = (tmp_path / "out" / "DATASHEET.md").read_text(encoding="utf-8")
    assert "0 groups are one animal each, as their names tell. 3 others are runs" in sheet
    # Named as the mice, another layout is told but taken.
    flat = pack(tmp_path / "flat.zip", [(f"{i}.png", picture(i)) for i in range(3)])
    batches = archives.archive_source(str(flat), sources.Options(tmp_path / "work"), layout="mice")
    rows = [row for batch in batches for row in batch.rows]
    assert {(row["label"], row["group"]) for row in rows} == {("mouse", "mice/all/run 0")}
    assert "expected folders KXN, IN and C of photographs, found" in capsys.readouterr().err
