"""Conversations that were left, in a folder, until their clients come back."""

import hashlib
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_ID_BYTES = 32
_ID = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 bytes as token_urlsafe writes them


@dataclass
class SessionsConfig:
    """Which conversations are saved, where, and for how long."""

    folder: str | None = None
    """Where. None saves none. Whoever can read it can read what was said: keep it to the server's user."""

    save: str = "asked"
    """asked: those of clients that connect with `session=new`. always: all; an id is told in the header
    Moshi-TTT-Session of the answer that opens the connection."""

    keep_hours: float = 24.0
    """Sessions that nobody came back to for so long are deleted."""

    most: int = 100
    """Files in the folder. Beyond it, new sessions are refused."""

    def check(self) -> None:
        """Raise ValueError for settings that cannot work."""
        if self.save not in ("asked", "always"):
            raise ValueError(f"sessions.save must be asked or always, got {self.save!r}")
        if self.save == "always" and self.folder is None:
            raise ValueError("sessions.save=always needs sessions.folder=FOLDER")
        if not self.keep_hours > 0 or self.most < 1:
            raise ValueError("sessions.keep_hours and sessions.most must be more than 0")


class SessionError(Exception):
    """A session cannot be had.

    Args:
        status: of the HTTP answer.
        why: for the client.
    """

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status
        self.why = why


class SessionFolder:
    """Files of sessions, and which are in use. An id is a secret: files are named by its digest.

    Args:
        config: with a folder.
    """

    def __init__(self, config: SessionsConfig):
        assert config.folder is not None
        self._config = config
        self._folder = Path(config.folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._used: set[str] = set()
        self.sweep()

    def path(self, session: str) -> Path:
        """The file of an id."""
        return self._folder / f"{hashlib.sha256(session.encode()).hexdigest()}.session"

    def take_new(self) -> str:
        """An id for a new conversation, in use from now on.

        Raises:
            SessionError: there are too many sessions.
        """
        self.sweep()
        kept = {path.name for path in self._folder.glob("*.session")}
        if len(kept | {self.path(used).name for used in self._used}) >= self._config.most:
            raise SessionError(503, "no room for another session; talk without one, or come back later")
        session = secrets.token_urlsafe(_ID_BYTES)
        self._used.add(session)
        return session

    def take(self, session: str) -> str:
        """A saved conversation's id, in use from now on.

        Raises:
            SessionError: it is no id, unknown, expired, or in use.
        """
        if _ID.fullmatch(session) is None:
            raise SessionError(400, "this is no session id; session=new begins a session")
        if session in self._used:
            raise SessionError(409, "this session is in use")
        self.sweep()
        if not self.path(session).is_file():
            raise SessionError(404, "there is no such session, or it has expired; session=new begins one")
        self._used.add(session)
        return session

    def give_back(self, session: str) -> None:
        """The id is not in use any more."""
        self._used.discard(session)

    def sweep(self) -> None:
        """Delete what nobody came back to."""
        oldest = time.time() - self._config.keep_hours * 3600
        used = {self.path(session) for session in self._used}
        for path in self._folder.glob("*.session"):
            if path not in used and path.stat().st_mtime < oldest:
                path.unlink()
                logger.info("a session has expired")
