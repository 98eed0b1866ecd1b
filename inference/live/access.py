"""Who may talk to a live server: a token, and no foreign web pages."""

import base64
import binascii
import hmac
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

TOKEN_VARIABLE = "MOSHI_TTT_TOKEN"
LEAST_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be nothing but this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(host: str, file: str | None) -> str | None:
    """The token that clients must give, from a file or the environment; None where none is needed.

    Raises:
        ValueError: the host is no loopback address and there is no token, or it is too short.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    source = f"the environment variable {TOKEN_VARIABLE}"
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ValueError(f"token_file {path} does not exist; write a token into it")
        token, source = path.read_text().strip(), f"token_file {path}"
    if token is None:
        if is_loopback(host):
            return None
        raise ValueError(
            f"host={host} can be reached from other machines, which needs a token: set {TOKEN_VARIABLE} or "
            "token_file=FILE, or use host=127.0.0.1. One is made with: python -c 'import secrets; "
            "print(secrets.token_urlsafe(32))'"
        )
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{source} holds no good token: expected {LEAST_TOKEN} or more printable ASCII characters "
            "without spaces"
        )
    return token


class Access:
    """Judges requests.

    Args:
        token: that they must bring; None for none.
        origins: further origins (`https://name:port`) whose pages may talk to this server.
    Raises:
        ValueError: an origin is none.
    """

    def __init__(self, token: str | None, origins: Sequence[str] = ()):
        self.token = token
        self._origins = {_checked_origin(origin) for origin in origins}
        self._hosts = {urlsplit(origin).netloc for origin in self._origins}

    def knows_token(self, request: web.Request) -> bool:
        """Whether the request brings the token, as `Authorization: Bearer`, as the password of Basic
        (`http://any:TOKEN@host` in Moshi's client), or as `?token=`."""
        if self.token is None:
            return True
        expected = self.token.encode()
        return any(hmac.compare_digest(given, expected) for given in _given_tokens(request))

    def foreign(self, request: web.Request) -> str | None:
        """Why a request seems to come from another site's page; None if it does not.

        Browsers let any page open a WebSocket to any server, and say in `Origin` whose page it is.
        """
        # A name of an attacker's that resolves to this machine makes its page's origin look like ours.
        if self.token is None and not is_loopback(_name(request.host)) and request.host not in self._hosts:
            return "this server answers to loopback names only; add yours to origins"
        origin = request.headers.get("Origin")
        if origin is None or origin in self._origins:
            return None
        parts = urlsplit(origin)
        # Where https is spoken, a page that came over http may be anybody's. Else a proxy may speak it.
        ours = ("https",) if request.secure else ("http", "https")
        if parts.scheme in ours and parts.netloc == request.host:
            return None
        return "pages of other sites may not talk to this server; add theirs to origins"


def _checked_origin(origin: str) -> str:
    parts = urlsplit(origin)
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or origin != f"{parts.scheme}://{parts.netloc}"
    ):
        raise ValueError(f"origins holds {origin!r}; expected something like https://moshi.example.org")
    return origin


def _name(host: str) -> str:
    """The name in `name:port`, `[::1]:port` or either alone."""
    return urlsplit(f"//{host}").hostname or ""


def _given_tokens(request: web.Request) -> Iterator[bytes]:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        yield value.strip().encode()
    elif kind.lower() == "basic":
        with suppress(binascii.Error):
            yield base64.b64decode(value, validate=True).partition(b":")[2]
    if (token := request.query.get("token")) is not None:
        yield token.encode()
