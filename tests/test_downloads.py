"""Downloads from a loopback server that breaks connections, changes files and sends elsewhere."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import File, Server, answer, failing, hang_up, send, serving

from tomjerry_utils import UserError, downloads

CONTENT = bytes(range(256)) * 4000  # about a MB


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        server.files["/pack.zip"] = File(CONTENT)
        yield server


def fetch(web: Server, folder: Path, extra: str = "", path: str = "/pack.zip") -> Path:
    return downloads.download(f"{web.address}{path}{extra}", folder)


def partial(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*.part*"))


def test_a_file_is_fetched_once(web: Server, tmp_path: Path) -> None:
    path = fetch(web, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name == "pack.zip"
    assert path.parent.name.startswith("127.0.0.1-")
    assert fetch(web, tmp_path) == path
    assert len(web.requests) == 1
    assert partial(tmp_path) == []
    # Files of one name from two places do not meet.
    web.files["/other/pack.zip"] = File(b"other")
    assert fetch(web, tmp_path, path="/other/pack.zip").read_bytes() == b"other"
    assert path.read_bytes() == CONTENT


def test_a_broken_connection_goes_on_where_it_was(web: Server, tmp_path: Path) -> None:
    web.files["/pack.zip"].breaks = [300_000, 1, 200_000]
    assert fetch(web, tmp_path).read_bytes() == CONTENT
    ranges = [request.get("Range") for request in web.requests]
    assert ranges == [None, "bytes=300000-", "bytes=300001-", "bytes=500001-"]
    assert {request.get("If-Range") for request in web.requests[1:]} == {'"1"'}


def test_a_killed_download_is_resumed_by_the_next_process(web: Server, tmp_path: Path) -> None:
    # The server breaks off; the process ends itself where it would try again.
    web.files["/pack.zip"].breaks = [400_000]
    call = (
        "import os, signal; from pathlib import Path; from tomjerry_utils import downloads\n"
        "downloads.time.sleep = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"downloads.download({web.address + '/pack.zip'!r}, Path({str(tmp_path)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", call], stderr=subprocess.DEVNULL, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert partial(tmp_path) == [".pack.zip.part", ".pack.zip.part.json"]
    assert not list(tmp_path.rglob("pack.zip"))
    assert fetch(web, tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in web.requests] == [None, "bytes=400000-"]
    assert partial(tmp_path) == []


@pytest.mark.parametrize("told", [True, False], ids=["honest", "ignores If-Range"])
def test_a_file_that_changed_meanwhile_is_not_mixed(
    web: Server, tmp_path: Path, told: bool
) -> None:
    old = web.files["/pack.zip"]
    old.breaks = [400_000]
    new = File(CONTENT[::-1], tag='"2"')

    def change(handler: object) -> None:
        web.files["/pack.zip"] = new
        if not told:
            del handler.headers["If-Range"]  # type: ignore[attr-defined]
        send(handler, new)

    web.faults = [lambda handler: send(handler, old), change]
    assert fetch(web, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("kind", ["no ranges", "no tag", "no length"])
def test_servers_that_can_do_less(web: Server, tmp_path: Path, kind: str) -> None:
    file = web.files["/pack.zip"]
    if kind == "no ranges":
        file.ranges, file.breaks = False, [300_000]
    elif kind == "no tag":
        file.tag, file.breaks = "", [300_000]
    else:
        file.length = False
    assert fetch(web, tmp_path).read_bytes() == CONTENT
    # What cannot be told from another file is begun anew.
    expected = {"no ranges": ["bytes=300000-"], "no tag": [None], "no length": []}
    assert [request.get("Range") for request in web.requests[1:]] == expected[kind]


def test_a_sum_makes_up_for_a_missing_tag(web: Server, tmp_path: Path) -> None:
    web.files["/pack.zip"].tag, web.files["/pack.zip"].breaks = "", [300_000]
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    fetch(web, tmp_path, f"#sha256={sha256}&size={len(CONTENT)}")
    assert [request.get("Range") for request in web.requests] == [None, "bytes=300000-"]
    assert "#" not in web.requests[0]["path"]


def test_bytes_other_than_asked_for_are_refused(web: Server, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"SHA-256 .*, {wrong} was expected"):
        fetch(web, tmp_path, f"#sha256={wrong}")
    with pytest.raises(UserError, match="7 were expected"):
        fetch(web, tmp_path, "#size=7")
    assert not list(tmp_path.rglob("*.zip"))
    path = fetch(web, tmp_path)
    path.write_bytes(b"changed by hand")
    with pytest.raises(UserError, match="remove it to have it fetched again"):
        fetch(web, tmp_path, f"#size={len(CONTENT)}")
    assert path.read_bytes() == b"changed by hand"


def test_what_may_pass_is_tried_again(web: Server, tmp_path: Path) -> None:
    web.faults = [failing(503, Retry_After="0"), hang_up, failing(500), failing(429)]
    assert fetch(web, tmp_path).read_bytes() == CONTENT
    assert len(web.requests) == 5


def test_pauses_grow_and_end(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloads, "PAUSE_S", 1.0)
    monkeypatch.setattr(downloads.time, "sleep", pauses.append)
    web.faults = [failing(503, Retry_After="7"), *[failing(502)] * 9]
    with pytest.raises(UserError, match=r"pack\.zip: the server answers 502, 5 times in a row"):
        downloads.download(f"{web.address}/pack.zip", tmp_path)
    assert pauses == [7.0, 2.0, 4.0, 8.0]
    assert len(web.requests) == downloads.TRIES


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "login"), (403, "login"), (404, "no such file"), (410, "no such file"), (418, "418")],
)
def test_refusals_are_one_line_and_final(
    web: Server, tmp_path: Path, status: int, told: str
) -> None:
    web.faults = [failing(status)]
    with pytest.raises(UserError, match=told) as caught:
        fetch(web, tmp_path)
    assert "\n" not in str(caught.value)
    assert f"{web.address}/pack.zip" in str(caught.value)
    assert len(web.requests) == 1


def test_nobody_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        address = f"{server.address}/pack.zip"
    with pytest.raises(UserError, match="refused"):
        downloads.download(address, tmp_path)
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.05)
    with serving() as server:
        quiet = threading.Event()
        server.faults = [lambda handler: quiet.wait(20) and None] * 9
        with pytest.raises(UserError, match="no byte for"):
            downloads.download(f"{server.address}/pack.zip", tmp_path)
        quiet.set()


def test_redirects_lead_to_the_web_only(web: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for you")
    web.redirects = {
        "/a": "/b",
        "/b": f"{web.address}/pack.zip",
        "/file": secret.as_uri(),
        "/ftp": "ftp://127.0.0.1/pack.zip",
        "/loop": "/loop",
    }
    assert fetch(web, tmp_path / "out", path="/a").read_bytes() == CONTENT
    for path, told in (
        ("/file", "sends on to file:"),
        ("/ftp", "sends on to ftp:"),
        ("/loop", "without end"),
    ):
        with pytest.raises(UserError, match=told):
            fetch(web, tmp_path / "out", path=path)
    found = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert b"not for you" not in b"".join(found)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://example.org/a.zip", "only http"),
        ("file:///etc/passwd", "only http"),
        ("https:///a.zip", "not an address"),
        ("https://example.org:port/a.zip", "not an address"),
        ("https://example.org/a b.zip", "not an address"),
        ("https://example.org/a.zip#sha256=12", "no sha256"),
    ],
)
def test_what_is_no_address_is_told(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        downloads.download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_passwords_in_addresses_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        downloads.download("https://user:hunter2@example.org/a.zip", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_full_disk_is_told_before_the_first_byte(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT)))
    with pytest.raises(UserError, match="do not fit on the disk"):
        fetch(web, tmp_path)
    assert partial(tmp_path) == []


def test_names_stay_in_the_folder(web: Server, tmp_path: Path) -> None:
    for path in ("/..%2f..%2fescaped.zip", "/%2e%2e", "/", "/" + "n" * 300 + ".zip"):
        web.files[path] = File(b"x")
        assert fetch(web, tmp_path / "out", path=path).is_relative_to(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert downloads.local(str(tmp_path / "here.zip"), tmp_path) == tmp_path / "here.zip"


def test_an_answer_without_a_file_is_told(web: Server, tmp_path: Path) -> None:
    web.faults = [lambda handler: answer(handler, 204)]
    with pytest.raises(UserError, match="204"):
        fetch(web, tmp_path)
