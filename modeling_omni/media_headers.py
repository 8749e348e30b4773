"""Headers of MP4 and QuickTime files that claim more than there is, refused before FFmpeg builds tables from them.

Few bytes of such a header can stand for any number of samples: a size for all of them, runs of fragments, an edit list
that shows one piece a thousand times. FFmpeg keeps an entry for each (measured: 672 bytes of file took 12 s and 670 MB,
12 KB with 1,000 edits of 1,000 samples 86 s), inside one call that no deadline can end. All other containers that are
read (`AV_FORMATS`) have data behind every entry, so that the limit on bytes bounds them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from .limits import MediaLimits
from .media_source import Deadline, refuse

BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")  # that hold the tables
FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"uuid", b"sidx")
SOUND = int.from_bytes(b"soun", "big")
PER_SAMPLE = 0xF00  # flags of a run that has at least four bytes for every sample


def boxes(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of the content) of the boxes in a stretch of the file."""
    while start + 8 <= stop:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1 and start + 16 <= stop:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        end = stop if size == 0 or start + size > stop else start + size
        if size and size < head:
            return
        yield kind, start + head, end
        start = end


def check_mp4(file: BinaryIO, name: str, limits: MediaLimits, deadline: Deadline) -> None:
    """Raises OmniInputError for tables over the limits; leaves `file` at its start. Other files pass.

    Samples of a track, and of all fragments, are not more than `max_video_packets`, nor than the bytes of the file; PCM
    sound, whose entries FFmpeg joins, is left to the limit on seconds. Edits are not more than `max_video_edits`.
    """
    head, size = file.read(8), file.seek(0, 2)
    if head[4:] in FIRST:
        found = {"runs": 0}
        for kind, begin, end in boxes(file, 0, size):
            if kind in (b"moov", b"moof"):
                _read_tables(file, begin, end, name, min(limits.max_video_packets, size), limits, deadline, found)
            deadline.check()
    file.seek(0)


def _read_tables(file, start: int, stop: int, name: str, most: int, limits, deadline, found: dict, depth=0) -> None:
    """Adds what counts of one box's content to `found`, and checks each track when it has been read."""
    for kind, begin, end in boxes(file, start, stop):
        deadline.check()
        if kind == b"trak":
            track = {"runs": found["runs"], "samples": 0, "edits": 0, "ticks": False, "sound": False}
            _read_tables(file, begin, end, name, most, limits, deadline, track, depth + 1)
            samples, edits = track["samples"], track["edits"]
            if samples > most and not (track["ticks"] and track["sound"]):
                raise _too_many(name, samples, most)
            if edits > limits.max_video_edits or edits > 1 and edits * samples > 4 * limits.max_video_packets:
                limit = f"{limits.max_video_edits} (MediaLimits.max_video_edits)"
                raise refuse(name, f"has an edit list of {edits} entries", limit, "convert it without one")
        elif kind in BOXES and depth < 8:
            _read_tables(file, begin, end, name, most, limits, deadline, found, depth + 1)
        elif kind == b"cmov":
            raise refuse(name, "has a compressed header (cmov)", do="convert it, for example with ffmpeg -c copy")
        elif kind in (b"stsz", b"stz2", b"stts", b"hdlr", b"elst", b"trun"):
            file.seek(begin)
            first, second, third, fourth = struct.unpack(">IIII", file.read(16).ljust(16, b"\0"))
            if kind in (b"stsz", b"stz2"):
                found["samples"] = max(found.get("samples", 0), third)
            elif kind == b"stts":  # every sample lasts one tick
                found["ticks"] = (second, fourth) == (1, 1)
            elif kind == b"hdlr":
                found["sound"] = third == SOUND
            elif kind == b"elst":
                found["edits"] = max(found.get("edits", 0), second)
            else:  # with bytes for each sample FFmpeg stops where they end
                found["runs"] += min(second, (end - begin) // 4) if first & PER_SAMPLE else second
                if found["runs"] > most:
                    raise _too_many(name, found["runs"], most)


def _too_many(name: str, samples: int, most: int):
    limit = f"{most} (MediaLimits.max_video_packets, or the bytes of the file)"
    return refuse(name, f"claims {samples} samples in a track", limit, "copy it again or cut it")


__all__ = ["check_mp4"]
