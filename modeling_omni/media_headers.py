"""Headers of MP4 and QuickTime files that claim more than there is, refused before FFmpeg builds tables from them.

Few bytes of such a header can stand for any number of samples: a size for all of them, runs of fragments, an edit list
that shows one piece a thousand times. FFmpeg keeps an entry for each (measured: 672 bytes of file took 12 s and 670 MB,
12 KB with 1,000 edits of 1,000 samples 86 s), inside one call that no deadline can end. All other containers that are
read (`AV_FORMATS`) have data behind every entry, so that the limit on bytes bounds them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .limits import MediaLimits, OmniInputError
from .media_source import Deadline, refuse

MAX_BOXES = 1_000_000  # of a file; five hours in fragments of two seconds have 120,000
DEPTH = 12  # boxes within boxes; FFmpeg reads 10
# where boxes may begin in the content of others than plain containers; FFmpeg reads a table wherever it stands
INSIDE = {b"meta": (0, 4), b"stsd": (8,)}
SAMPLE_ENTRY = (0, 8, 28, 44, 64, 78)
LEAVES = (b"mdat", b"stco", b"co64", b"stsc", b"stss", b"ctts", b"sidx")  # large, and without boxes
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
    size = file.seek(0, 2)
    reading = _Reading(file, name, min(limits.max_video_packets, size), limits, deadline)
    found = _Track()
    _read_tables(reading, 0, size, found)
    _check_track(reading, found)  # tables outside of any track
    file.seek(0)


@dataclass
class _Track:
    runs: int = 0  # samples of fragments
    samples: int = 0
    edits: int = 0
    ticks: bool = False  # every sample lasts one tick
    sound: bool = False


@dataclass
class _Reading:
    file: BinaryIO
    name: str
    most: int  # samples
    limits: MediaLimits
    deadline: Deadline
    boxes: int = 0


def _read_tables(reading: _Reading, start: int, stop: int, track: _Track, depth: int = 0, parent: bytes = b"") -> None:
    """Adds what counts of a stretch of boxes to `track`, and checks each track when it has been read."""
    for kind, begin, end in boxes(reading.file, start, stop):
        reading.deadline.check()
        reading.boxes += 1
        if reading.boxes > MAX_BOXES:
            raise refuse(reading.name, "has a header of too many boxes", f"{MAX_BOXES}", "convert it")
        if kind == b"cmov":
            raise refuse(reading.name, "has a compressed header (cmov)", do="convert it, as with ffmpeg -c copy")
        if kind in (b"stsz", b"stz2", b"stts", b"hdlr", b"elst", b"trun"):
            reading.file.seek(begin)
            first, second, third, fourth = struct.unpack(">IIII", reading.file.read(16).ljust(16, b"\0"))
            if kind in (b"stsz", b"stz2"):
                track.samples = max(track.samples, third)
            elif kind == b"stts":
                track.ticks = (second, fourth) == (1, 1)
            elif kind == b"hdlr":
                track.sound = third == SOUND
            elif kind == b"elst":
                track.edits = max(track.edits, second)
            else:  # with bytes for each sample FFmpeg stops where they end
                track.runs += min(second, (end - begin) // 4) if first & PER_SAMPLE else second
                if track.runs > reading.most:
                    raise _too_many(reading, track.runs)
        elif kind not in LEAVES and depth < DEPTH:
            inner = _Track() if kind == b"trak" else track
            for skipped in SAMPLE_ENTRY if parent == b"stsd" else INSIDE.get(kind, (0,)):
                _read_tables(reading, begin + skipped, end, inner, depth + 1, kind)
            if kind == b"trak":
                _check_track(reading, inner)


def _check_track(reading: _Reading, track: _Track) -> None:
    most = reading.limits.max_video_edits
    if track.samples > reading.most and not (track.ticks and track.sound):
        raise _too_many(reading, track.samples)
    if track.edits > most or track.edits > 1 and track.edits * track.samples > 4 * reading.limits.max_video_packets:
        limit = f"{most} (MediaLimits.max_video_edits)"
        raise refuse(reading.name, f"has an edit list of {track.edits} entries", limit, "convert it without one")


def _too_many(reading: _Reading, samples: int) -> OmniInputError:
    limit = f"{reading.most} (MediaLimits.max_video_packets, or the bytes of the file)"
    return refuse(reading.name, f"claims {samples} samples in a track", limit, "copy it again or cut it")


__all__ = ["check_mp4"]
