"""Where media bytes come from: paths, bytes, file objects, data: URLs and (when allowed) http(s), under limits.

Also the helpers that turn every library's error into the one exception type of the project (`limits.py`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np

from .limits import MediaLimits, OmniInputError


def refuse(
    name: str, problem: str, limit: str | None = None, do: str = "check the file or give another"
) -> OmniInputError:
    return OmniInputError("; ".join(part for part in (f"{name}: {problem}", limit and f"limit {limit}", do) if part))


def words_of(error: Exception, length: int = 200) -> str:
    """What a library says, without the paths that FFmpeg and libsndfile repeat (a server must not tell them)."""
    said = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return " ".join(str(said).split())[:length] or type(error).__name__


@contextlib.contextmanager
def decoding(name: str, kind: str):
    """Re-raise whatever a codec library throws as OmniInputError (hostile files reach every type there is)."""
    try:
        yield
    except OmniInputError:
        raise
    except Exception as error:
        problem = f"cannot be decoded as {kind} ({type(error).__name__}: {words_of(error)})"
        raise refuse(name, problem, do=f"check that it is whole and really {kind}") from error


class Deadline:
    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.at = name, seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.at:
            limit = f"{self.seconds:g} s (MediaLimits.timeout)"
            raise refuse(self.name, "decoding takes too long", limit, "give a shorter or smaller item, or raise it")


class TimedFile:
    """A file that can be read until the deadline: decoders that ask for more and more bytes end there (a JPEG may hold
    any number of scans, each over all its pixels)."""

    def __init__(self, file: BinaryIO, deadline: Deadline):
        self.file, self.deadline, self.seek, self.tell = file, deadline, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.deadline.check()
        return self.file.read(size)


def _printable(text: str) -> str:
    """On one line of ASCII, however it is spelt: a name goes to terminals and logs."""
    text = re.sub(r"[^ -~]", lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"


def is_tensor(source: Any) -> bool:
    return hasattr(source, "detach") and hasattr(source, "cpu")


def to_numpy(source: Any) -> np.ndarray:
    """numpy view of an array or torch tensor (bfloat16 too); anything else is converted."""
    if is_tensor(source):
        source = source.detach().cpu()
        return (source.float() if source.is_floating_point() else source).numpy()
    return np.asarray(source)


@contextlib.contextmanager
def open_source(source: Any, kind: str, limits: MediaLimits) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name for messages, seekable binary file) for a path, bytes, file object, URL or {"path", "bytes"} dict.

    Always a file object, never a name, goes to the decoders, so that no string is ever read as a protocol of FFmpeg.
    """
    if isinstance(source, dict):  # rows of `datasets` that were not decoded
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str) and source[:5].lower() == "data:":
        name = f"{kind} in a data: URL"
        data = _read_data_url(source, name, limits)
    elif isinstance(source, str) and "://" in source[:32]:
        name = _printable(source)
        data = _fetch(source, name, limits)
    elif isinstance(source, (str, os.PathLike)):
        name = _printable(os.fsdecode(source))
        with contextlib.closing(_open_path(source, name, limits)) as file:
            yield name, file
        return
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, data = f"{kind} of {len(source)} bytes", source
    elif hasattr(source, "read"):
        name = _printable(str(getattr(source, "name", f"{kind} file object")))
        with decoding(name, kind):
            data = source.read(limits.max_bytes + 1)
        if not isinstance(data, bytes):
            raise refuse(name, "is a file object that gives text", do="open it in binary mode ('rb')")
    else:
        do = "give a path, bytes, a binary file object, an array or a URL"
        raise refuse(kind, f"cannot be read from {type(source).__name__}", do=do)
    _check_bytes(len(data), name, limits)
    yield name, io.BytesIO(data)


def _check_bytes(size: int, name: str, limits: MediaLimits) -> None:
    if size == 0:
        raise refuse(name, "is empty (0 bytes)")
    if size > limits.max_bytes:
        limit = f"{limits.max_bytes} bytes (MediaLimits.max_bytes)"
        raise refuse(name, f"has {size} bytes", limit, "give a smaller item or raise it")


def _open_path(path: str | os.PathLike, name: str, limits: MediaLimits) -> BinaryIO:
    if not limits.allow_paths:
        raise refuse(name, "file names are not allowed here (MediaLimits.allow_paths)", do="send a data: URL instead")
    try:
        file = open(path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))
    except (OSError, ValueError) as error:  # ValueError: NUL bytes, lone surrogates
        reason = getattr(error, "strerror", None) or str(error)
        raise refuse(name, f"cannot be opened ({reason})", do="check the path") from error
    try:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):  # a pipe or device may never end
            raise refuse(name, "is not a regular file", do="give the path of a media file")
        _check_bytes(info.st_size, name, limits)
    except BaseException:
        file.close()
        raise
    return file


def _read_data_url(url: str, name: str, limits: MediaLimits) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma:
        raise refuse(name, "has no comma", do="write data:<type>;base64,<data>")
    if not head.lower().endswith(";base64"):
        _check_bytes(len(payload) // 3, name, limits)
        return unquote_to_bytes(payload)
    _check_bytes(len(payload) * 3 // 4, name, limits)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(name, f"is not base64 ({error})", do="encode the file's bytes with base64") from error


def _fetch(url: str, name: str, limits: MediaLimits) -> bytes:
    """Download over http(s). Each hop's host is resolved once, all addresses checked, and one of them connected to."""
    if not limits.allow_urls:
        do = "download it first, or set MediaLimits(allow_urls=True)"
        raise refuse(name, "URLs are not allowed (MediaLimits.allow_urls is False)", do=do)
    at = time.monotonic() + limits.url_timeout
    for _ in range(limits.max_redirects + 1):
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as error:
            raise refuse(name, f"is not a URL ({error})", do="check the address") from error
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise refuse(name, "only http:// and https:// URLs without credentials are read", do="download it first")
        try:
            status, location, body = _get(parts, host, port, name, limits, at)
        except OmniInputError:
            raise
        except Exception as error:  # socket, ssl and http errors of every kind
            if time.monotonic() >= at:
                limit = f"{limits.url_timeout:g} s (MediaLimits.url_timeout)"
                raise refuse(name, "the download takes too long", limit, "download it first or raise it") from error
            problem = f"cannot be downloaded ({type(error).__name__}: {words_of(error)})"
            raise refuse(name, problem, do="check the address") from error
        if status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
        elif status != 200:
            raise refuse(name, f"the server answered with status {status}", do="check the address")
        else:
            return body
    raise refuse(
        name, "redirects too often", f"{limits.max_redirects} (MediaLimits.max_redirects)", "check the address"
    )


def _get(parts, host: str, port: int, name: str, limits: MediaLimits, at: float) -> tuple[int, str | None, bytes]:
    left = max(0.1, at - time.monotonic())
    addresses = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in addresses:
        if f"{host}:{port}" not in limits.private_hosts and not _is_public(address):
            problem = f"{host} resolves to {address}, which is not a public address (MediaLimits.private_hosts)"
            raise refuse(name, problem, do="give a public URL or download it first")
    raw = socket.create_connection((sorted(addresses)[0], port), timeout=left)
    # A server that drips bytes restarts the socket timeout with each; the timer ends the whole exchange.
    timer = threading.Timer(left, lambda: raw.shutdown(socket.SHUT_RDWR))
    timer.daemon = True
    timer.start()
    try:
        connection = http.client.HTTPConnection(host, port, timeout=left)
        connection.sock = raw
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=left)
            connection.sock = raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "modeling-omni"})
        response = connection.getresponse()
        if response.status != 200:
            return response.status, response.headers.get("Location"), b""
        cap = min(limits.max_url_bytes, limits.max_bytes)
        body = response.read(cap + 1)
        if len(body) > cap or (response.length or 0) > 0 and len(body) + response.length > cap:
            limit = f"{cap} bytes (MediaLimits.max_url_bytes)"
            raise refuse(name, "is too large", limit, "download it first or raise it")
        if response.length:
            raise refuse(name, "the download ended early", do="try again")
        if time.monotonic() >= at:
            raise TimeoutError("deadline")
        return 200, None, body
    finally:
        timer.cancel()
        raw.close()


# in use inside networks (a cloud has its metadata there), but not among what `ipaddress` of every Python calls private
NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24")]
GLOBAL_IPV6, NAT64 = (ipaddress.ip_network(text) for text in ("2000::/3", "64:ff9b::/96"))


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip.is_global and ip in GLOBAL_IPV6
        ip = inner
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)
