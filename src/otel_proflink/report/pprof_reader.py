# SPDX-License-Identifier: Apache-2.0
"""Reads pprof profiles (``perftools.profiles.Profile``, gzip or plain) without a protobuf runtime.

Strict on purpose: whatever a pprof consumer could trip over (an index out of range, a second
location with the same id, a sample with a value too few) is one `CaptureError` naming the file,
never a profile that is silently wrong. Work and memory are bounded by the size of the file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import MAX_FILE_BYTES, CaptureError

__all__ = ["Frame", "LabelSet", "Profile", "Sample", "Stack", "ValueType", "read_profile"]

MAX_SAMPLES = 4_000_000
# A frame costs a byte of the file at least, but a location that stands for many inlined functions
# multiplies: sixteen times is more than any compiler does, and stops a file made to explode.
MAX_FRAMES_PER_BYTE = 16

_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_TAG_LOCATION_IDS = 1 << 3 | _BYTES
_TAG_VALUES = 2 << 3 | _BYTES
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WINDOW = 31  # zlib's number for "a gzip header, not a zlib one"


class ValueType(NamedTuple):
    """What a sample value counts, e.g. ``cpu`` in ``nanoseconds``."""

    type: str
    unit: str


class Frame(NamedTuple):
    """One call: qualified function name, source file and line (0: unknown)."""

    function: str
    file: str
    line: int


@dataclass(slots=True, eq=False, frozen=True)
class Stack:
    """Frames, leaf first. Compared by identity: samples with the same stack share one object."""

    frames: tuple[Frame, ...]


@dataclass(slots=True, eq=False, frozen=True)
class LabelSet:
    """The labels of a sample. Compared by identity: equal sets are mostly one object."""

    strings: dict[str, str]
    numbers: dict[str, int]


class Sample(NamedTuple):
    """One stack with one set of labels; `values` run parallel to `Profile.sample_types`."""

    stack: Stack
    values: tuple[int, ...]
    labels: LabelSet


@dataclass(slots=True, frozen=True)
class Profile:
    """One decoded profile. Times are nanoseconds, `time_nanos` since the Unix epoch."""

    file: str
    sample_types: tuple[ValueType, ...]
    samples: list[Sample]
    time_nanos: int
    duration_nanos: int
    period_type: ValueType
    period: int
    default_sample_type: str

    def value_index(self, kind: str, unit: str) -> int:
        """The position of one sample type in `Sample.values`.

        Raises:
            CaptureError: the profile does not have it.
        """
        try:
            return self.sample_types.index(ValueType(kind, unit))
        except ValueError:
            have = ", ".join(f"{t.type}/{t.unit}" for t in self.sample_types) or "none"
            reason = f"not a profile of ours: no sample type {kind}/{unit} (it has: {have})"
            raise CaptureError(self.file, reason) from None


def read_profile(source: str | os.PathLike[str] | bytes, *, name: str = "<bytes>") -> Profile:
    """Decodes one profile from a path, or from bytes that errors shall call `name`.

    Raises:
        CaptureError: unreadable, cut short, not a pprof profile, or larger than the limits.
    """
    if isinstance(source, bytes):
        data = source
    else:
        name = os.fspath(source)
        try:
            data = _read_bounded(Path(source))
        except OSError as error:
            raise CaptureError(name, error.strerror or str(error)) from error
        except _MalformedError as error:
            raise CaptureError(name, error.reason) from None
    try:
        if data[:2] == _GZIP_MAGIC:
            data = _gunzip(data)
        return _Decoder(data).decode(name)
    except _MalformedError as error:
        raise CaptureError(name, f"not a readable pprof profile: {error}") from None


class _MalformedError(Exception):
    """Why the bytes are no profile, and where."""

    def __init__(self, reason: str, offset: int | None = None) -> None:
        super().__init__(reason if offset is None else f"{reason} (at byte {offset})")
        self.reason = reason


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _MalformedError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def _gunzip(data: bytes) -> bytes:
    parts = []
    room = MAX_FILE_BYTES
    while data:  # a gzip file is one or more members
        member = zlib.decompressobj(_GZIP_WINDOW)
        try:
            part = member.decompress(data, room + 1)
        except zlib.error as error:
            raise _MalformedError(f"damaged gzip data: {error}") from None
        if len(part) > room:
            raise _MalformedError(f"larger than {MAX_FILE_BYTES >> 20} MiB once unpacked")
        if not member.eof:
            raise _MalformedError("cut short: the gzip data ends before its end mark")
        room -= len(part)
        parts.append(part)
        data = member.unused_data
    return b"".join(parts)


# --- the wire format -----------------------------------------------------------------------------


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """An unsigned 64-bit varint and the offset behind it."""
    if at < end and data[at] < 0x80:  # most numbers of a profile are small
        return data[at], at + 1
    value = shift = 0
    start = at
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
        shift += 7
        if shift >= 70:
            break
    else:
        raise _MalformedError("cut short in the middle of a number", start)
    raise _MalformedError("a number of more than 64 bits", start)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, wire type, and a value, or the bounds of its bytes."""
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _MalformedError("a field with number 0", start)
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, wire, value, at
        elif wire in (_BYTES, _FIXED64, _FIXED32):
            if wire == _BYTES:
                length, at = _varint(data, at, end)
            else:
                length = 8 if wire == _FIXED64 else 4
            if length > end - at:
                raise _MalformedError("cut short: a field runs over the end of its message", start)
            yield number, wire, at, at + length
            at += length
        else:
            raise _MalformedError(f"a field of unknown wire type {wire}", start)


def _expect(wire: int, wanted: int, what: str, at: int) -> None:
    if wire != wanted:
        raise _MalformedError(f"{what} has the wrong wire type", at)


def _integers(data: bytes, at: int, end: int) -> list[int]:
    """The packed varints of a repeated field."""
    values = []
    value = shift = 0
    for byte in data[at:end]:
        if byte < 0x80:
            values.append(value | byte << shift)
            value = shift = 0
        else:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift >= 70:
                raise _MalformedError("a number of more than 64 bits", at)
    if shift:
        raise _MalformedError("cut short in the middle of a number", at)
    if values and max(values) >> 64:
        raise _MalformedError("a number of more than 64 bits", at)
    return values


# --- the messages --------------------------------------------------------------------------------


class _Decoder:
    """One profile's decoding: its tables, and what samples have in common, decoded once."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._strings: list[str] = []
        self._functions: dict[int, tuple[str, str]] = {}
        self._locations: dict[int, tuple[Frame, ...]] = {}
        self._frame_room = MAX_FRAMES_PER_BYTE * len(data)
        # Keyed by their encoded bytes: most samples repeat a stack, a label or all their labels.
        self._stacks: dict[Hashable, Stack] = {}
        self._values: dict[bytes, tuple[int, ...]] = {}
        self._labels: dict[bytes, tuple[str, str | int]] = {}
        self._label_sets: dict[Hashable, LabelSet] = {}

    def decode(self, name: str) -> Profile:
        data = self._data
        sample_types: list[tuple[int, int]] = []
        samples: list[tuple[int, int]] = []
        locations: list[tuple[int, int]] = []
        functions: list[tuple[int, int]] = []
        period_type = (0, 0)
        scalars = {9: 0, 10: 0, 12: 0, 14: 0}
        # The string table may stand behind everything that points into it: bounds first.
        for number, wire, at, end in _fields(data, 0, len(data)):
            if number == 2:
                _expect(wire, _BYTES, "a sample", at)
                samples.append((at, end))
            elif number == 6:
                _expect(wire, _BYTES, "a string", at)
                # Names are any Unicode; what is not even that is shown, not refused.
                self._strings.append(data[at:end].decode("utf-8", "backslashreplace"))
            elif number == 4:
                _expect(wire, _BYTES, "a location", at)
                locations.append((at, end))
            elif number == 5:
                _expect(wire, _BYTES, "a function", at)
                functions.append((at, end))
            elif number == 1:
                _expect(wire, _BYTES, "a sample type", at)
                sample_types.append((at, end))
            elif number == 11:
                _expect(wire, _BYTES, "the period type", at)
                period_type = (at, end)
            elif number in scalars:
                _expect(wire, _VARINT, f"field {number} of the profile", at)
                scalars[number] = at
        if len(samples) > MAX_SAMPLES:
            raise _MalformedError(f"{len(samples)} samples, more than {MAX_SAMPLES}")
        if not self._strings or self._strings[0] != "":
            raise _MalformedError("the string table does not begin with an empty string")

        for at, end in functions:
            self._function(at, end)
        for at, end in locations:
            self._location(at, end)
        types = tuple(self._value_type(at, end) for at, end in sample_types)
        if samples and not types:
            raise _MalformedError("samples without a sample type")
        return Profile(
            file=name,
            sample_types=types,
            samples=[self._sample(at, end, len(types)) for at, end in samples],
            time_nanos=_signed(scalars[9]),
            duration_nanos=_signed(scalars[10]),
            period_type=self._value_type(*period_type),
            period=_signed(scalars[12]),
            default_sample_type=self._string(scalars[14], "the default sample type"),
        )

    def _string(self, index: int, what: str) -> str:
        if index >= len(self._strings):
            raise _MalformedError(f"{what} points to string {index} of {len(self._strings)}")
        return self._strings[index]

    def _scalars(self, at: int, end: int, what: str, last: int) -> list[int]:
        """Fields 1..last of a message that has only plain numbers; 0 where absent."""
        values = [0] * (last + 1)
        for number, wire, value, _ in _fields(self._data, at, end):
            if number <= last:
                _expect(wire, _VARINT, f"field {number} of {what}", at)
                values[number] = value
        return values

    def _value_type(self, at: int, end: int) -> ValueType:
        _, kind, unit = self._scalars(at, end, "a sample type", 2)
        return ValueType(self._string(kind, "a sample type"), self._string(unit, "a sample type"))

    def _function(self, at: int, end: int) -> None:
        _, identity, name, system_name, file, _ = self._scalars(at, end, "a function", 5)
        if identity == 0 or identity in self._functions:
            raise _MalformedError(f"function id {identity} is reserved or used twice", at)
        self._functions[identity] = (
            self._string(name or system_name, f"the name of function {identity}"),
            self._string(file, f"the file of function {identity}"),
        )

    def _location(self, at: int, end: int) -> None:
        identity = address = 0
        frames = []
        for number, wire, value, stop in _fields(self._data, at, end):
            if number == 4:
                _expect(wire, _BYTES, "a line", value)
                _, function, line = self._scalars(value, stop, "a line", 2)
                if function not in self._functions:
                    raise _MalformedError(
                        f"a line points to function {function}: there is none", value
                    )
                frames.append(Frame(*self._functions[function], _signed(line)))
            elif number in (1, 3):
                _expect(wire, _VARINT, f"field {number} of a location", at)
                if number == 1:
                    identity = value
                else:
                    address = value
        if identity == 0 or identity in self._locations:
            raise _MalformedError(f"location id {identity} is reserved or used twice", at)
        self._locations[identity] = tuple(frames) or (Frame(f"{address:#x}", "", 0),)

    def _sample(self, at: int, end: int, value_count: int) -> Sample:
        # Every encoder we know writes packed locations, packed values, then the labels. Then the
        # bytes themselves are the keys under which the decoded parts are found again.
        ids, after_ids = self._packed(at, end, _TAG_LOCATION_IDS)
        numbers, after_values = self._packed(after_ids, end, _TAG_VALUES)
        if not ids or not numbers:
            return self._sample_in_any_order(at, end, value_count)
        rest = self._data[after_values:end]
        labels = self._label_sets.get(rest)
        if labels is None:
            found = []
            for number, wire, start, stop in _fields(self._data, after_values, end):
                if number != 3 or wire != _BYTES:
                    return self._sample_in_any_order(at, end, value_count)
                found.append(self._label(start, stop))
            labels = self._label_set(rest, found)
        stack = self._stacks.get(ids)
        if stack is None:
            stack = self._stack(ids, _integers(ids, 0, len(ids)), at)
        values = self._values.get(numbers)
        if values is None:
            values = self._value_tuple(_integers(numbers, 0, len(numbers)), value_count, at)
            self._values[numbers] = values
        return Sample(stack, values, labels)

    def _packed(self, at: int, end: int, tag: int) -> tuple[bytes, int]:
        """The bytes of a packed field if it is the one that stands here, else nothing."""
        data = self._data
        if at >= end or data[at] != tag:
            return b"", at
        length, start = _varint(data, at + 1, end)
        if length > end - start:
            raise _MalformedError("cut short: a field runs over the end of its sample", at)
        return data[start : start + length], start + length

    def _sample_in_any_order(self, at: int, end: int, value_count: int) -> Sample:
        data = self._data
        ids: list[int] = []
        values: list[int] = []
        labels: list[tuple[str, str | int]] = []
        for number, wire, start, stop in _fields(data, at, end):
            if number in (1, 2):
                into = ids if number == 1 else values
                if wire == _BYTES:
                    into += _integers(data, start, stop)
                else:
                    _expect(wire, _VARINT, f"field {number} of a sample", at)
                    into.append(start)
            elif number == 3:
                _expect(wire, _BYTES, "a label", at)
                labels.append(self._label(start, stop))
        stack_key, label_key = tuple(ids), tuple(labels)
        return Sample(
            self._stacks.get(stack_key) or self._stack(stack_key, ids, at),
            self._value_tuple(values, value_count, at),
            self._label_sets.get(label_key) or self._label_set(label_key, labels),
        )

    def _stack(self, key: Hashable, ids: list[int], at: int) -> Stack:
        frames: list[Frame] = []
        for identity in ids:
            found = self._locations.get(identity)
            if found is None:
                raise _MalformedError(f"a sample points to location {identity}: there is none", at)
            self._frame_room -= len(found)
            if self._frame_room < 0:
                raise _MalformedError("more frames than a file of this size can mean", at)
            frames += found
        stack = self._stacks[key] = Stack(tuple(frames))
        return stack

    def _value_tuple(self, values: list[int], count: int, at: int) -> tuple[int, ...]:
        if len(values) != count:
            raise _MalformedError(f"a sample with {len(values)} values instead of {count}", at)
        if max(values) >> 63:  # rare, and a call for each number is not cheap
            return tuple(map(_signed, values))
        return tuple(values)

    def _label(self, at: int, end: int) -> tuple[str, str | int]:
        encoded = self._data[at:end]
        label = self._labels.get(encoded)
        if label is None:
            _, key, text, number, _ = self._scalars(at, end, "a label", 4)
            name = self._string(key, "a label's key")
            if not name:
                raise _MalformedError("a label without a key", at)
            label = (name, self._string(text, f"label {name}") if text else _signed(number))
            self._labels[encoded] = label
        return label

    def _label_set(self, key: Hashable, labels: list[tuple[str, str | int]]) -> LabelSet:
        strings = {name: value for name, value in labels if isinstance(value, str)}
        numbers = {name: value for name, value in labels if isinstance(value, int)}
        label_set = self._label_sets[key] = LabelSet(strings, numbers)
        return label_set
