"""What stands before the demo's page: host names, sizes, room on the disk, and a policy that keeps the browser here.

ASGI middleware; nothing is read of a request that is refused.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path

MAX_BODY_BYTES = 1024**2  # of a request that uploads nothing
UPLOAD_SECONDS = 600.0  # for an upload to arrive
# ways of gradio that this page does not go: they fetch addresses for a client, run programs or keep what was said
CLOSED = (
    "=http:",
    "=https:",
    "/file/http",
    "/proxy=",
    "/process_recording",
    "/component_server",
    "/deep_link",
    "/vibe-",
)
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "permissions-policy": "camera=(), geolocation=()",
}


def folder_bytes(folder: str | os.PathLike) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                pass
    return total


class Guard:
    """Args:
    hosts: names this server answers to; None: any. A page in a browser can give this machine a name of its own,
        and would then be let in.
    uploads: folder of uploaded files, which may hold `disk_bytes`. file_bytes: of one file.
    files: of one upload.
    """

    def __init__(self, app, hosts: tuple[str, ...] | None, uploads: str, disk_bytes: int, file_bytes: int, files: int):
        self.app, self.hosts, self.uploads = app, hosts, Path(uploads)
        self.disk_bytes, self.file_bytes, self.files = disk_bytes, file_bytes, files
        self.coming: list[int] = []  # bytes of the uploads that are on their way

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        host = host[: host.rfind(":")] if host.rfind(":") > host.rfind("]") else host
        if self.hosts is not None and host.strip("[]").lower() not in self.hosts:
            return await refuse(send, 403, "this server does not answer to that host name")
        if any(part in scope["path"].lower() for part in CLOSED):
            return await refuse(send, 404, "there is no such page")
        upload = scope["path"].rstrip("/").endswith("/upload")
        # the body of an upload has some more than its files; its parser counts the files themselves
        limit = self.files * self.file_bytes + MAX_BODY_BYTES if upload else MAX_BODY_BYTES
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            return await refuse(send, 413, f"a request may have {limit} bytes")
        coming = int(length[:20]) if b"content-length" in headers else limit
        if upload and folder_bytes(self.uploads) + sum(self.coming) + coming > self.disk_bytes:
            return await refuse(send, 507, "there is no more room for files; try again later")
        taken, until = 0, time.monotonic() + UPLOAD_SECONDS if upload else None

        async def limited():
            nonlocal taken, until
            try:
                left = None if until is None else max(0.0, until - time.monotonic())
                message = await asyncio.wait_for(receive(), left)
            except (asyncio.TimeoutError, TimeoutError):
                return {"type": "http.disconnect"}
            taken += len(message.get("body", b""))
            if taken > limit:  # no length was given, or a wrong one
                return {"type": "http.disconnect"}
            until = until if message.get("more_body") else None  # what is left to come is that the client goes
            return message

        async def with_headers(message):
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in known]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        if not upload:
            return await self.app(scope, limited, with_headers)
        self.coming.append(coming)
        try:
            await self.app(scope, limited, with_headers)
        finally:
            self.coming.remove(coming)
            if not self.coming:
                self.tidy()

    def tidy(self) -> None:
        """Deletes what uploads that broke off have left: files that are whole lie in folders of their own."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.uploads)):
                if entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)


async def refuse(send, status: int, text: str) -> None:
    body = ('{"detail": "' + text + '"}').encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["Guard", "folder_bytes"]
