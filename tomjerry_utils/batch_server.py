"""A server's Batch API: shards up, results down, through failures and lost replies."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_requests import ATTEMPTS, LONGEST_HOLD, LONGEST_WAIT, told
from tomjerry_utils.captioner import Session
from tomjerry_utils.pacing import retry_after

TRANSFER = 600.0  # seconds for a shard to go up or results to come down, at least
DAY = 86400.0  # seconds
INTENT = "tomjerry_intent"  # the name of an intent in its batch's metadata


class Refused(Exception):
    """The server will not create a batch; the message is its reason."""


class BatchServer:
    """Files and batches at the server of a session; all of it may be asked again."""

    def __init__(self, session: Session) -> None:
        self._session, self._base_url = session, session.source.base_url
        self._batches = session.client.batches
        slow = session.client.with_options(timeout=max(session.source.timeout, TRANSFER))
        self._files = slow.files

    def create(self, shard: Path, intent: str, *, fresh: bool) -> str:
        """Make sure that a batch of an intent exists, once; its name at the server.

        Args:
            shard: the file of its requests; without it nothing can have been created, and "" is
                what comes back.
            fresh: nobody has tried before, so that it need not be looked for.

        Raises:
            Refused: the server will not have it.
            UserError: the server fails for too long.
        """
        import openai

        for attempt in range(1, ATTEMPTS + 1):
            # A reply that was lost may have been that of a batch that is there.
            if not fresh and (found := self.find(intent)):
                return found
            if not shard.is_file():
                return ""
            try:
                with shard.open("rb") as file:
                    uploaded = self._files.create(file=file, purpose="batch")
                fresh = False
                made = self._batches.create(
                    input_file_id=uploaded.id,
                    endpoint="/v1/responses",
                    completion_window="24h",
                    metadata={INTENT: intent},
                )
                return str(made.id)
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                reason, passing = self._reason(error)
                if not passing:
                    raise Refused(reason) from None
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"{self._base_url}: cannot create a batch: {reason}: run again, it will "
                        "be looked for first"
                    ) from None
                _rest(attempt, error)
        raise AssertionError("unreachable")

    def find(self, intent: str) -> str:
        """The server's name of the batch that an intent became, "" where there is none."""
        # An intent's own name begins with the moment it was made, in nanoseconds.
        made = int(intent.partition("-")[0], 16) / 1e9

        def search() -> str:
            for found in self._batches.list(limit=100):
                if (found.metadata or {}).get(INTENT) == intent:
                    return str(found.id)
                if found.created_at < made - DAY:  # the newest come first
                    break
            return ""

        return str(self._call("looking for a batch", search))

    def look(self, name: str) -> Any:
        """How a batch is doing."""
        return self._call(f"looking at batch {name}", lambda: self._batches.retrieve(name))

    def content(self, file: str) -> bytes:
        """A file that a batch has left."""
        return bytes(self._call(f"fetching {file}", lambda: self._files.content(file).read()))

    def _call(self, what: str, function: Callable[[], Any]) -> Any:
        import openai

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                reason, passing = self._reason(error)
                if not passing or attempt == ATTEMPTS:
                    raise UserError(f"{self._base_url}: {what}: {reason}") from None
                _rest(attempt, error)
        raise AssertionError("unreachable")

    def _reason(self, error: Any) -> tuple[str, bool]:
        """What went wrong, and whether it may be better next time."""
        status = getattr(error, "status_code", None)
        if status is None:
            cause = type(error.__cause__ or error).__name__
            return self._session.clean(f"no answer of the server's: {error} ({cause})"), True
        reason = self._session.clean(f"HTTP {status}: {told(error)}")
        if status in (404, 405, 501):
            reason += " (a server without batches answers 'tomjerry caption run')"
        quota = str(error.code or "") in ("insufficient_quota", "billing_hard_limit_reached")
        return reason, (status in (408, 409, 429) or status >= 500) and status != 501 and not quota


def _rest(attempt: int, error: Any) -> None:
    response = getattr(error, "response", None)
    asked = retry_after(response.headers) if response is not None else None
    pause = random.uniform(0.5, 1.0) * min(LONGEST_WAIT, 0.5 * 2**attempt)
    time.sleep(pause if asked is None else min(asked, LONGEST_HOLD))
