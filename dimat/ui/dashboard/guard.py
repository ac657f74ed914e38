"""Guards the dashboard: the host names it accepts, the token, the page's headers.

Without a token only this machine is served. A page of another site could still make a browser on this machine send
requests under its own host name, resolved to 127.0.0.1 (DNS rebinding); so requests under other host names are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dimat.errors import ConfigError, NetworkError, SecurityError
from dimat.net.ports import is_loopback

LEAST_TOKEN = 16
OPEN = frozenset({"/healthz"})
"""Paths answered without a token: they reveal nothing about the run."""
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def parse_listen(listen: str) -> tuple[str, int]:
    """Split `host:port`; ConfigError if it has another form."""
    host, sign, port = listen.rpartition(":")
    if not sign or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f'cannot listen on {listen!r}: it must be "host:port", e.g. "127.0.0.1:8300"')
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_token(file: Path) -> str:
    """Return a file's token; SecurityError if it is missing, short, or open to others."""
    make = f"make one with: (umask 077; openssl rand -hex 32 > {file})"
    try:
        mode = os.stat(file).st_mode
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SecurityError(f"cannot read the dashboard's token from {file}: {reason}; {make}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
        raise SecurityError(f"others can read or change {file}; do: chmod 600 {file}")
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise SecurityError(f"the token in {file} must be {LEAST_TOKEN} or more letters and digits; {make}")
    return token


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to serve other machines without a token."""
    if token is None and not is_loopback(host):
        raise SecurityError(
            f"the dashboard on {host} would be open to everyone who reaches it; give a token (--token-file FILE of "
            "`dimat dashboard`, monitor.dashboard_token_file of an agent), or listen on 127.0.0.1"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; NetworkError if the port cannot be opened."""
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(found[0], socket.SOCK_STREAM)
    except OSError as error:
        raise NetworkError(f"the dashboard cannot listen on {shown}: {error.strerror or error}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(found[4])
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise NetworkError(
            f"the dashboard cannot listen on {shown}: {error.strerror or error}; choose another port, or stop "
            "the process that has this one"
        ) from error
    opened.setblocking(False)
    return opened


class Guard:
    """ASGI middleware: checks the Host header and the token, and adds the headers.

    `host`, `port`: its address. The token comes as `Authorization: Bearer`, or once as `?token=`, which is answered
    with a cookie that holds a hash of the token. Comparisons take constant time.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, token: str | None = None) -> None:
        self._app = app
        self._names = {"localhost", host.lower(), socket.gethostname().lower(), socket.gethostname().lower() + ".local"}
        self._token = None if token is None else token.encode()
        self._cookie = f"dimat_dashboard_{port}"  # browsers send cookies to all ports of a host
        self._proof = "" if token is None else hmac.new(token.encode(), b"dashboard", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    headers[key] = value
                if "cache-control" not in headers:
                    headers["cache-control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._ours(headers.get("host", "")):
            return PlainTextResponse("This dashboard is not served under that name.\n", status_code=421)
        if self._token is None or scope["path"] in OPEN:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for key, value in query if key == "token"]
        if given and hmac.compare_digest(given[0].encode(), self._token):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            answer = RedirectResponse(_local(scope["path"]) + (f"?{rest}" if rest else ""), status_code=303)
            answer.set_cookie(self._cookie, self._proof, httponly=True, samesite="strict", path="/")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(bearer.strip().encode(), self._token):
            return None
        if hmac.compare_digest(_cookie(headers.get("cookie", ""), self._cookie).encode(), self._proof.encode()):
            return None
        return PlainTextResponse(
            "This dashboard needs its token: open it once with ?token=TOKEN at the end of the address.\n",
            status_code=401,
            headers={"www-authenticate": "Bearer"},
        )

    def _ours(self, given: str) -> bool:
        host = given.lower()
        if host.startswith("["):
            host = host[1:].partition("]")[0]
        else:
            host = host.partition(":")[0]
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self._names
        return True  # no name, so nothing that could be made to resolve to us


def _local(path: str) -> str:
    # "//host" would lead to another site
    return "/" + path.lstrip("/\\")


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value
