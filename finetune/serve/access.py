"""Who may reach the server: the address to listen on, the token, and other sites' pages."""

import hmac
import ipaddress
import os
import socket
from urllib.parse import urlsplit

from aiohttp import web

from finetune.errors import UserError
from finetune.serve.options import ServeOptions

MIN_TOKEN_LENGTH = 8


class Gate:
    """The gate of a server lets requests in, or says why not.

    Args:
        host: the address that the server listens on, as in `--host`.
        token: what callers must know; None: nothing, and then requests must be for this machine.
    """

    def __init__(self, host: str, token: str | None) -> None:
        self.host, self.token = host, token

    def refusal(self, request: web.Request) -> tuple[str, web.HTTPException] | None:
        """Return the kind and the answer of a refusal; None: the request may go on."""
        origin = request.headers.get("Origin")
        if origin is not None and _netloc(origin) != request.host:
            return "origin", web.HTTPForbidden(text="this page is of another site\n")
        if self.token is not None:
            if self._is_known(request, self.token):
                return None
            return "token", web.HTTPUnauthorized(
                text="the token is missing or wrong: Authorization: Bearer TOKEN or ?token=TOKEN\n",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return self.name_refusal(request)

    def name_refusal(self, request: web.Request) -> tuple[str, web.HTTPException] | None:
        """Return the refusal of a request for a name that is not this machine's: of the page, which
        asks for the token itself, nothing else is refused."""
        if self.token is not None:
            return None
        # A site may give its name this machine's address (DNS rebinding): its page in a user's
        # browser then comes from the same origin.
        name = _hostname(request.host)
        if name is None or not (is_own(name) or name == self.host.lower()):
            return "host", web.HTTPForbidden(
                text="without a --token the server answers to localhost alone\n"
            )
        return None

    def _is_known(self, request: web.Request, token: str) -> bool:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.query.get("token", "")
        return hmac.compare_digest(_raw(given), _raw(token))


def _raw(token: str) -> bytes:
    # Headers that are not UTF-8 come with surrogates.
    return token.strip().encode("utf-8", "surrogateescape")


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def token_of(options: ServeOptions) -> str | None:
    """Return what callers must know; None: nothing."""
    return options.token or os.environ.get("MOSHI_TTT_TOKEN") or None


def listen(options: ServeOptions) -> socket.socket:
    """Return a socket that listens where the server is to be; callers wait until it answers.

    Raises:
        UserError: see `check_access` and `bind`.
    """
    check_access(options.host, token_of(options))
    return bind(options.host, options.port)


def check_access(host: str, token: str | None) -> None:
    """Check that nobody can reach the server who should not.

    Raises:
        UserError: others can reach the address, and there is nothing that they must know.
    """
    if token is not None and len(token.strip()) < MIN_TOKEN_LENGTH:
        raise UserError(f"--token: must have at least {MIN_TOKEN_LENGTH} characters.")
    if token is None and not is_own(host):
        raise UserError(
            f"--host: others can reach {host}; give a --token that callers must know, and put TLS "
            "in front of the server: what is said goes over the network as it is (docs/talk.md)."
        )


def is_own(host: str) -> bool:
    """Return whether a name or address is this machine's own, which others cannot reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        UserError: the address is no address of this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        # UnicodeError: a part of the name is empty or too long.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host: {host} is no address ({reason}).") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port: {host}:{port} cannot be listened on ({error.strerror}); choose another "
            "--port, or stop what uses it."
        ) from None
    return listening


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
