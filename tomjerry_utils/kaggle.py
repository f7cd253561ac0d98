"""Kaggle datasets by their slug, through Kaggle's own client kagglehub (an optional package).

kagglehub finds the token, keeps what it has fetched under `~/.cache/kagglehub` (or
`KAGGLEHUB_CACHE`) and goes on with a broken download where it stopped; here is what it leaves open:
trying again, plain words for what went wrong, and whether the layout is the one expected.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, photo_sets
from tomjerry_utils.runs import log
from tomjerry_utils.sources import IMAGE_SUFFIXES, Batch, Options, list_files, one_line

TRIES = 5  # attempts that a broken connection may cost
PAUSE_S = 2.0  # before the second attempt; doubled for each further one


@dataclass(frozen=True)
class DataSet:
    """What is known of a dataset.

    Attributes:
        slug: `owner/name`.
        layout: one of `photo_sets.LAYOUTS`.
        pictures: how many the first version had; 0 where that is not known.
    """

    slug: str
    layout: str
    pictures: int = 0


KNOWN = (
    DataSet("balabaskar/tom-and-jerry-image-classification", "frames", 5478),
    DataSet("shaunthesheep/microsoft-catsvsdogs-dataset", "classes"),
)


def kaggle_source(where: str, options: Options) -> Iterator[Batch]:
    """A Kaggle dataset by its slug, or a folder that it was unpacked to.

    Args:
        where: `owner/name`, `owner/name/versions/3` for a certain version, or a folder.

    Raises:
        UserError: cannot be downloaded, or in none of the layouts of `photo_sets`.
    """
    local = Path(where).is_dir()
    if not local and where not in options.fetched:
        options.fetched[where] = download(where)
    folder = Path(where) if local else options.fetched[where]
    known = next((k for k in KNOWN if not local and _owner_and_name(where) == k.slug), None)
    layout = photo_sets.layout_of(folder)
    expected = [known.layout] if known else list(photo_sets.LAYOUTS)
    if layout not in expected:
        words = " or ".join(photo_sets.LAYOUTS[name] for name in expected)
        raise UserError(
            f"{where}: expected {words}, found {photo_sets.found_in(folder)}: "
            "name a version with another layout, or give a folder in one of these"
        )
    if known and known.pictures:
        found = len(list_files(folder, IMAGE_SUFFIXES))
        if found != known.pictures:
            log(f"collect: {where}: expected {known.pictures} pictures, found {found}")
    yield from photo_sets.batches(folder, layout, options, name="kaggle")


def download(slug: str) -> Path:
    """Fetch a dataset into kagglehub's cache, or return at once when it is there.

    Args:
        slug: `owner/name` or `owner/name/versions/3`; without a version, Kaggle is asked for the
            newest each time.

    Raises:
        UserError: no such dataset or version, no permission, no connection, or no kagglehub.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/versions/[1-9]\d*)?", slug):
        raise UserError(
            f"'{slug}' is neither a folder nor a Kaggle slug like owner/name "
            "or owner/name/versions/3"
        )
    # kagglehub talks to stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import kagglehub
        except ImportError:
            raise UserError(
                f"{slug}: Kaggle needs the package kagglehub: 'pip install kagglehub', "
                "or download the dataset by hand and give its folder"
            ) from None
        for attempt in range(1, TRIES + 1):
            try:
                return Path(kagglehub.dataset_download(slug))
            except Exception as error:
                # kagglehub raises many kinds, of its own and of its HTTP client: all mean no data.
                if attempt == TRIES or not _passing(error):
                    raise _told(slug, error, attempt) from None
                wait = PAUSE_S * 2 ** (attempt - 1)
                log(f"collect: {slug}: {_words(error)}, going on in {wait:.0f} s")
                time.sleep(wait)
    raise AssertionError("every attempt returns or raises")


def credentials() -> str:
    """Where kagglehub finds a token, by its rules (version 1.0); empty where it finds none.

    In its order: `KAGGLE_API_TOKEN` (a token, or a file that holds it), `~/.kaggle/access_token`,
    `KAGGLE_USERNAME` with `KAGGLE_KEY`, and `kaggle.json` in `KAGGLE_CONFIG_DIR` or `~/.kaggle`.
    In Colab and in Kaggle's own notebooks it asks the notebook as well.
    """
    home = Path.home() / ".kaggle"
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    for name in ("access_token", "access_token.txt"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (home / name).read_text().strip():
                return str(home / name)
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    file = Path(os.environ.get("KAGGLE_CONFIG_DIR", home)) / "kaggle.json"
    return str(file) if file.exists() else ""


# ---- what went wrong -----------------------------------------------------------------------------


def _status(error: BaseException) -> int:
    """The HTTP status behind an error, 0 where there is none."""
    code = getattr(getattr(error, "response", None), "status_code", 0)
    return code if isinstance(code, int) else 0


def _passing(error: BaseException) -> bool:
    """True for what may be over in a moment; kagglehub then goes on with what has arrived."""
    if status := _status(error):
        return status in (408, 429) or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    # By name: kagglehub's own, and those of requests, which it is built on.
    return bool(names & {"ConnectionError", "Timeout", "ChunkedEncodingError"}) or (
        "DataCorruptionError" in names
    )


def _told(slug: str, error: BaseException, attempts: int) -> UserError:
    """An error of kagglehub in one line: what, and how to mend it."""
    status = _status(error)
    source = credentials()
    if status == 401 or (status == 403 and not source):
        token = f"the token from {source} is not accepted" if source else "it wants a token"
        return UserError(
            f"{slug}: Kaggle refuses ({status}): {token}: make one at "
            "https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN "
            "(or ~/.kaggle/access_token), or give a downloaded folder"
        )
    if status == 403:
        return UserError(
            f"{slug}: Kaggle refuses (403): the account of {source} may not read it, or there is "
            f"none: open https://www.kaggle.com/datasets/{_owner_and_name(slug)}, accept its terms "
            "there, or give a downloaded folder"
        )
    if status == 404:
        return UserError(
            f"{slug}: Kaggle has no such dataset or version (404): check owner, name and version"
        )
    again = f", {attempts} times" if attempts > 1 else ""
    if _passing(error):
        return UserError(
            f"{slug}: cannot be downloaded ({_words(error)}{again}): try again later, it "
            "goes on where it was; or give a downloaded folder"
        )
    if isinstance(error, OSError) and error.errno and error.strerror and not status:
        return UserError(
            f"{slug}: cannot be stored ({_words(error)}): make room, or move it with "
            "KAGGLEHUB_CACHE"
        )
    return UserError(
        f"{slug}: cannot be downloaded ({_words(error)}): check the slug, the network and the "
        f"token ({source or 'none is set; KAGGLE_API_TOKEN is the simplest'}), or give a "
        "downloaded folder"
    )


def _words(error: BaseException) -> str:
    """An error in a few words; requests wraps several in one another."""
    if status := _status(error):
        return f"answer {status}"
    if type(error).__name__ == "DataCorruptionError":
        return "what arrives has another MD5 checksum than it should"
    cause: Any = error
    while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
    cause = getattr(cause, "reason", None) or cause
    if isinstance(cause, BaseException) and len(cause.args) > 1 and isinstance(cause.args[0], str):
        return " ".join(cause.args[0].split())
    return one_line(cause if isinstance(cause, BaseException) else error)


def _owner_and_name(slug: str) -> str:
    return "/".join(slug.split("/")[:2])
