"""Files from the web: fetched once, resumed where the connection broke, checked before use.

Only http and https are spoken. What is under way lies beside its place as `.part`, with a note of
what the server said the file is, so that a later call goes on only with the very same file.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from tomjerry_utils import UserError, __version__
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import hash_file, hash_obj, locked, log, read_json, write_json

TRIES = 5  # attempts in a row that may bring nothing new
PAUSE_S = 1.0  # before the second attempt; doubled for each further one
TIMEOUT_S = 30.0  # without a byte
MOST_REDIRECTS = 10
_CHUNK = 2**18
_RESERVE = 2**26  # bytes of the disk that a download leaves free
_LONGEST_WAIT_S = 300.0  # that a server may ask for
_MIB = 2**20


@dataclass(frozen=True)
class _Wanted:
    url: str  # without what follows '#'
    name: str
    sha256: str
    size: int | None


class _Retry(Exception):
    """Something that may be over in a moment; holds the seconds to wait, if the server said so."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def is_url(where: str) -> bool:
    """True for what looks like the address of something on the web, of whatever scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def local(where: str, folder: Path) -> Path:
    """A path as it is; of an address, the file that `download` puts into `folder`."""
    return download(where, folder) if is_url(where) else Path(where).expanduser()


def download(url: str, folder: Path) -> Path:
    """Fetch a file, or return at once when an earlier call did.

    A broken connection, a time-out, 429 and 5xx are tried again, with a growing pause, as long as
    no `TRIES` attempts in a row bring nothing; a download goes on where it stopped if the server
    can do that and the file is still the same. Redirects are followed, from https to https only.

    Args:
        url: http or https. `#sha256=<64 hex digits>` and `size=<bytes>` after it, joined by `&`,
            are checked.
        folder: gets `<host>-<hash of the address>/<file name>`.

    Returns:
        the path of the complete file.

    Raises:
        UserError: not such an address, nothing there, no permission, no connection, a full disk,
            or bytes other than asked for.
    """
    wanted = _parse(url)
    host = urllib.parse.urlsplit(wanted.url).hostname or ""
    home = folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{hash_obj(wanted.url)[:8]}"
    target = home / wanted.name
    with locked(home):
        if target.is_file():
            _check(target, target, wanted)
            return target
        home.mkdir(parents=True, exist_ok=True)
        part = home / f".{wanted.name}.part"
        _fetch(wanted, part)
        _check(part, target, wanted)
        _sync(part)
        os.replace(part, target)
        _note(part).unlink(missing_ok=True)
    return target


def _parse(url: str) -> _Wanted:
    plain, _, extra = url.partition("#")
    try:
        parts = urllib.parse.urlsplit(plain)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"{plain}: not an address: check it") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError(
            f"{plain}: only http:// and https:// are fetched: save it and give the file"
        )
    if parts.username or parts.password:
        # Not shown again: what is printed ends in logs and notebooks.
        raise UserError(f"an address of {host} holds a password: save the file and give its path")
    if not host or re.search(r"[\x00-\x20\x7f]", plain):
        raise UserError(f"{plain!r}: not an address: check it (spaces are written %20)")
    sha256, size = "", None
    for pair in filter(None, extra.split("&")):
        key, _, value = pair.partition("=")
        if key == "sha256" and re.fullmatch(r"[0-9a-fA-F]{64}", value):
            sha256 = value.lower()
        elif key == "size" and value.isdecimal():
            size = int(value)
        elif key in ("sha256", "size"):
            raise UserError(f"{url}: '{value}' is no {key}: write #sha256=<64 hex digits>&size=N")
    last = urllib.parse.unquote(parts.path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._")[-80:] or "download"
    # A name such as `ü/…` in an address must be escaped to be sent.
    ascii_url = urllib.parse.quote(plain, safe="%/:=&?~+!$,;'@()*[]")
    return _Wanted(ascii_url, name, sha256, size)


def _check(path: Path, target: Path, wanted: _Wanted) -> None:
    """Compare a complete file with what was asked for; one under way is removed if it differs."""
    size = path.stat().st_size
    problem = ""
    if wanted.size is not None and size != wanted.size:
        problem = f"{size} bytes, {wanted.size} were expected"
    elif wanted.sha256 and (found := hash_file(path)) != wanted.sha256:
        problem = f"SHA-256 {found}, {wanted.sha256} was expected"
    if not problem:
        return
    if path != target:
        path.unlink()
        raise UserError(f"{wanted.url}: not the file that was asked for ({problem}): check both")
    raise UserError(f"{target}: {problem}: remove it to have it fetched again")


# ---- attempts ------------------------------------------------------------------------------------


def _fetch(wanted: _Wanted, part: Path) -> None:
    failures, most = 0, 0
    while True:
        most = max(most, _size(part))
        try:
            _attempt(wanted, part)
            return
        except _Retry as error:
            failures = 0 if _size(part) > most else failures + 1
            if failures >= TRIES:
                raise UserError(
                    f"{wanted.url}: {error}, {TRIES} times in a row: try again later, "
                    "what has arrived is kept"
                ) from None
            wait = error.wait_s if error.wait_s is not None else PAUSE_S * 2 ** max(failures - 1, 0)
            log(f"download {wanted.name}: {error}, going on in {wait:.0f} s")
            time.sleep(wait)


def _attempt(wanted: _Wanted, part: Path) -> None:
    """One request; what arrives is appended to `part`."""
    note = _read_note(part)
    have = _size(part) if note else 0
    if have and have == note.get("total"):
        return  # ended between the last byte and the renaming
    headers = {"User-Agent": f"tomjerry-utils/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.get("version"):
            headers["If-Range"] = note["version"]
    request = urllib.request.Request(wanted.url, headers=headers)
    try:
        with _opener().open(request, timeout=TIMEOUT_S) as answer:
            _receive(answer, part, wanted, have, note)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                # The file has shrunk or changed since: what is here is of no use.
                part.unlink()
                raise _Retry("the file has changed on the server") from None
            raise _refusal(wanted, error.code, error.headers) from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{wanted.url}: its certificate is not valid ({reason.verify_message}): "
                "check the address and this machine's clock"
            ) from None
        raise _Retry(_words(reason)) from None
    except (TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _Retry(_words(error)) from None
    except http.client.HTTPException as error:
        raise _Retry(f"no proper answer ({type(error).__name__})") from None


def _receive(answer: Any, part: Path, wanted: _Wanted, have: int, note: dict[str, Any]) -> None:
    """Write the body of an answer behind the `have` bytes that are there, or from the start."""
    length = _number(answer.headers.get("Content-Length"))
    version, start = _version(answer.headers), 0
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        whole = _number(found[3]) if found else None
        same = note.get("total") in (None, whole) and version in ("", note.get("version"))
        if not found or int(found[1]) != have or not same:
            part.unlink(missing_ok=True)
            raise _Retry("the server went on with another part than asked for")
        start, total = have, whole
    elif answer.status == 200:
        total = length
    else:
        raise UserError(f"{wanted.url}: answer {answer.status}, which holds no file: check it")
    if wanted.size is not None and total not in (None, wanted.size):
        raise UserError(f"{wanted.url}: {total} bytes, {wanted.size} were expected: check both")
    if total is not None:
        _make_room(part, total - start, wanted)
    # The note is written before the first byte, and only for a file that can be told from another.
    if start == 0:
        part.unlink(missing_ok=True)
        _note(part).unlink(missing_ok=True)
        if version or wanted.sha256:
            write_json(_note(part), {"url": wanted.url, "version": version, "total": total})
    done = start
    shown = progress(
        (total or 0) // _MIB, f"download {wanted.name}", unit="MiB", initial=start // _MIB
    )
    with shown as bar, part.open("ab") as file:
        while chunk := _read(answer):
            file.write(chunk)
            done += len(chunk)
            bar.update(done // _MIB - bar.done)
    if total is not None and done < total:
        raise _Retry(f"the connection broke after {done} of {total} bytes")


def _read(answer: Any) -> bytes:
    try:
        chunk: bytes = answer.read(_CHUNK)
    except http.client.IncompleteRead as error:
        raise _Retry(f"the connection broke ({_words(error)})") from None
    except (TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _Retry(_words(error)) from None
    return chunk


def _refusal(wanted: _Wanted, code: int, headers: Message) -> Exception:
    """What to raise for an answer that is an error."""
    if code in (408, 425, 429) or code >= 500:
        wait = _number(headers.get("Retry-After"))
        # Without a number the pause is ours; a server that asks for an hour is not waited for.
        told = min(float(wait), _LONGEST_WAIT_S) if wait is not None else None
        return _Retry(f"the server answers {code}", told)
    if code in (401, 403, 407):
        return UserError(
            f"{wanted.url}: the server wants a login or refuses ({code}): "
            "save the file with a browser and give its path"
        )
    if code in (404, 410):
        return UserError(f"{wanted.url}: there is no such file ({code}): check the address")
    return UserError(f"{wanted.url}: the server answers {code}: check the address")


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = (urllib.parse.urlsplit(u).scheme.lower() for u in (req.full_url, newurl))
        if new not in ("http", "https") or (old == "https" and new != "https"):
            raise UserError(
                f"{req.full_url}: sends on to {newurl.split('?')[0]}, which is not fetched: "
                "check the address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any
    ) -> Any:
        # urllib looks at the scheme before it asks `redirect_request`, and calls that an HTTP
        # error of the code that the server sent.
        target = urllib.parse.urljoin(req.full_url, headers.get("Location") or "")
        if urllib.parse.urlsplit(target).scheme.lower() not in ("http", "https"):
            self.redirect_request(req, fp, code, msg, headers, target)
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except urllib.error.HTTPError as error:
            if error.code // 100 == 3:
                error.close()
                raise UserError(f"{req.full_url}: is sent on without end: check it") from None
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows no other schemes than http and https: no files, no ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


# ---- small things --------------------------------------------------------------------------------


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    """What is known of an earlier attempt; empty where it is of no use."""
    if not part.is_file():
        return {}
    with contextlib.suppress(UserError):
        note = read_json(_note(part))
        if isinstance(note, dict):
            return note
    return {}


def _version(headers: Message) -> str:
    """What tells this file from a later one at the same address, as `If-Range` wants it."""
    tag = headers.get("ETag", "")
    # A weak tag promises the same meaning, not the same bytes.
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _make_room(part: Path, wanted_bytes: int, wanted: _Wanted) -> None:
    free = shutil.disk_usage(part.parent).free
    if wanted_bytes + _RESERVE > free:
        raise UserError(
            f"{wanted.url}: {wanted_bytes / 2**30:.1f} GiB do not fit on the disk of "
            f"{part.parent}, {free / 2**30:.1f} GiB are free: make room"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() else None


def _words(error: Any) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte for {TIMEOUT_S:.0f} s"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
