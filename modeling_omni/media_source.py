"""Where media bytes come from: paths, bytes, file objects, data: URLs and (when allowed) http(s), under limits.

Also the one exception type of the project, the limits, and the helpers that turn every library's error into it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np


class OmniInputError(ValueError):
    """Input that is refused: item, what was wrong, the limit, what to do next."""


@dataclass
class MediaLimits:
    """Every limit of media decoding, with its default. One instance is passed around; None anywhere means these."""

    max_bytes: int = 4 * 1024**3  # of a file, bytes object or data: URL
    max_url_bytes: int = 512 * 1024**2  # of a download
    max_image_pixels: int = 80_000_000  # width * height of an image
    max_image_side: int = 32_768  # longer side of an image, in pixels
    max_video_pixels: int = 8192 * 4320  # width * height of a video frame
    max_video_frames: int = 2048  # frames kept of one video
    max_video_bytes: int = 4 * 1024**3  # of the kept frames, uint8 RGB
    max_video_packets: int = 2_000_000  # frames that a video may hold (5.5 hours at 100 fps)
    max_video_seconds: float = 5.5 * 3600  # of the chosen window of a video
    max_audio_seconds: float = 5.5 * 3600
    max_audio_channels: int = 64
    min_audio_rate: int = 1_000  # Hz
    max_audio_rate: int = 768_000  # Hz
    timeout: float = 300.0  # seconds of wall clock that decoding one item may take
    url_timeout: float = 30.0  # seconds that one download may take
    max_redirects: int = 5
    allow_paths: bool = True  # False: strings are never file names (a server with foreign requests)
    allow_urls: bool = False  # http and https; data: URLs are always allowed
    allow_private_urls: bool = False  # loopback, private and link-local addresses; for tests only


def refuse(
    name: str, problem: str, limit: str | None = None, do: str = "check the file or give another"
) -> OmniInputError:
    return OmniInputError("; ".join(part for part in (f"{name}: {problem}", limit and f"limit {limit}", do) if part))


@contextlib.contextmanager
def decoding(name: str, kind: str):
    """Re-raise whatever a codec library throws as OmniInputError (hostile files reach every type there is)."""
    try:
        yield
    except OmniInputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"cannot be decoded as {kind} ({type(error).__name__}: {reason})"
        raise refuse(name, problem, do=f"check that it is whole and really {kind}") from error


class Deadline:
    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.at = name, seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.at:
            limit = f"{self.seconds:g} s (MediaLimits.timeout)"
            raise refuse(self.name, "decoding takes too long", limit, "give a shorter or smaller item, or raise it")


def _printable(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
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
            problem = f"cannot be downloaded ({type(error).__name__}: {error})"
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
        if not limits.allow_private_urls and not _is_public(address):
            problem = f"{host} resolves to {address}, which is not a public address"
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


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast
