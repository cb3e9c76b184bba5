# SPDX-License-Identifier: Apache-2.0
"""An independent pprof decoder (and encoder): google's protobuf runtime with pprof's own schema.

Nothing in here knows our encoder or our reader. The schema is `proto/profile.proto` of
github.com/google/pprof, field by field.

    decode(data)          -> the Profile message (gzip or plain bytes)
    samples(message)      -> its samples, resolved: stack, values by type, labels
    ProfileBuilder        -> builds a valid profile for tests of the reading side
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "perftools.profiles"
_INT64, _UINT64, _BOOL, _STRING, _MESSAGE = 3, 4, 8, 9, 11  # FieldDescriptorProto.Type

# message -> (field, number, type or message name, repeated)
_SCHEMA: dict[str, list[tuple[str, int, int | str, bool]]] = {
    "Profile": [
        ("sample_type", 1, "ValueType", True),
        ("sample", 2, "Sample", True),
        ("mapping", 3, "Mapping", True),
        ("location", 4, "Location", True),
        ("function", 5, "Function", True),
        ("string_table", 6, _STRING, True),
        ("drop_frames", 7, _INT64, False),
        ("keep_frames", 8, _INT64, False),
        ("time_nanos", 9, _INT64, False),
        ("duration_nanos", 10, _INT64, False),
        ("period_type", 11, "ValueType", False),
        ("period", 12, _INT64, False),
        ("comment", 13, _INT64, True),
        ("default_sample_type", 14, _INT64, False),
        ("doc_url", 15, _INT64, False),
    ],
    "ValueType": [("type", 1, _INT64, False), ("unit", 2, _INT64, False)],
    "Sample": [
        ("location_id", 1, _UINT64, True),
        ("value", 2, _INT64, True),
        ("label", 3, "Label", True),
    ],
    "Label": [
        ("key", 1, _INT64, False),
        ("str", 2, _INT64, False),
        ("num", 3, _INT64, False),
        ("num_unit", 4, _INT64, False),
    ],
    "Mapping": [
        ("id", 1, _UINT64, False),
        ("memory_start", 2, _UINT64, False),
        ("memory_limit", 3, _UINT64, False),
        ("file_offset", 4, _UINT64, False),
        ("filename", 5, _INT64, False),
        ("build_id", 6, _INT64, False),
        ("has_functions", 7, _BOOL, False),
        ("has_filenames", 8, _BOOL, False),
        ("has_line_numbers", 9, _BOOL, False),
        ("has_inline_frames", 10, _BOOL, False),
    ],
    "Location": [
        ("id", 1, _UINT64, False),
        ("mapping_id", 2, _UINT64, False),
        ("address", 3, _UINT64, False),
        ("line", 4, "Line", True),
        ("is_folded", 5, _BOOL, False),
    ],
    "Line": [
        ("function_id", 1, _UINT64, False),
        ("line", 2, _INT64, False),
        ("column", 3, _INT64, False),
    ],
    "Function": [
        ("id", 1, _UINT64, False),
        ("name", 2, _INT64, False),
        ("system_name", 3, _INT64, False),
        ("filename", 4, _INT64, False),
        ("start_line", 5, _INT64, False),
    ],
}


def _profile_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="proflink_tests/profile.proto", package=_PACKAGE, syntax="proto3"
    )
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                field.type = _MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            else:
                field.type = kind
    # A pool of our own: another library of the test run may register the same schema.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Profile"))


Profile: Any = _profile_class()


def decode(data: bytes) -> Any:
    """The Profile message of gzip or plain pprof bytes; raises protobuf's DecodeError."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    message = Profile()
    message.ParseFromString(data)
    return message


@dataclass(frozen=True)
class DecodedSample:
    """One sample with every index resolved."""

    stack: tuple[tuple[str, str, int], ...]  # (function, file, line), leaf first
    values: dict[str, int]  # by sample type name
    labels: dict[str, str]
    numbers: dict[str, int]

    @property
    def functions(self) -> tuple[str, ...]:
        """The function names of the stack, leaf first."""
        return tuple(function for function, _, _ in self.stack)


def samples(message: Any) -> Iterator[DecodedSample]:
    """The samples of a decoded profile. A bad index raises KeyError or IndexError."""
    text = message.string_table
    functions = {f.id: (text[f.name], text[f.filename]) for f in message.function}
    locations = {
        location.id: tuple((*functions[line.function_id], line.line) for line in location.line)
        for location in message.location
    }
    types = [text[t.type] for t in message.sample_type]
    for sample in message.sample:
        yield DecodedSample(
            stack=tuple(frame for id_ in sample.location_id for frame in locations[id_]),
            values=dict(zip(types, sample.value, strict=True)),
            labels={text[x.key]: text[x.str] for x in sample.label if x.str},
            numbers={text[x.key]: x.num for x in sample.label if not x.str},
        )


class ProfileBuilder:
    """Builds a valid profile, interned as an encoder would."""

    def __init__(
        self,
        sample_types: Iterable[tuple[str, str]] = (
            ("samples", "count"),
            ("cpu", "nanoseconds"),
            ("wall", "nanoseconds"),
        ),
        *,
        time_nanos: int = 1_700_000_000_000_000_000,
        duration_nanos: int = 1_000_000_000,
        period: int = 10_000_000,
    ) -> None:
        self.message = Profile(time_nanos=time_nanos, duration_nanos=duration_nanos, period=period)
        self.message.string_table.append("")
        self._strings = {"": 0}
        self._functions: dict[tuple[str, str], int] = {}
        self._locations: dict[tuple[str, str, int], int] = {}
        for kind, unit in sample_types:
            self.message.sample_type.add(type=self.string(kind), unit=self.string(unit))
        self.message.period_type.type = self.string("cpu")
        self.message.period_type.unit = self.string("nanoseconds")
        self.message.default_sample_type = self.string("cpu")

    def string(self, text: str) -> int:
        """The index of a string, added on first use."""
        if text not in self._strings:
            self._strings[text] = len(self._strings)
            self.message.string_table.append(text)
        return self._strings[text]

    def location(self, function: str, file: str, line: int) -> int:
        """The id of a location with one line, added on first use."""
        frame = (function, file, line)
        if frame not in self._locations:
            if (function, file) not in self._functions:
                identity = self._functions[function, file] = len(self._functions) + 1
                self.message.function.add(
                    id=identity,
                    name=self.string(function),
                    system_name=self.string(function),
                    filename=self.string(file),
                )
            identity = self._locations[frame] = len(self._locations) + 1
            location = self.message.location.add(id=identity)
            location.line.add(function_id=self._functions[function, file], line=line)
        return self._locations[frame]

    def sample(
        self,
        stack: Iterable[tuple[str, str, int]],
        values: Iterable[int],
        labels: Mapping[str, str | int] | None = None,
    ) -> None:
        """Adds one sample; the stack leaf first."""
        sample = self.message.sample.add()
        sample.location_id.extend(self.location(*frame) for frame in stack)
        sample.value.extend(values)
        for key, value in (labels or {}).items():
            if isinstance(value, str):
                sample.label.add(key=self.string(key), str=self.string(value))
            else:
                sample.label.add(key=self.string(key), num=value)

    def encode(self, *, compress: bool = True) -> bytes:
        """The bytes of the profile."""
        plain: bytes = self.message.SerializeToString()
        return gzip.compress(plain, mtime=0) if compress else plain
