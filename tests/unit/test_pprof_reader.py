# SPDX-License-Identifier: Apache-2.0
"""The pprof reader against google's protobuf runtime, and against files made to break it."""

from __future__ import annotations

import contextlib
import gzip
import random
import time
from pathlib import Path
from typing import Any

import pytest

from otel_proflink.report import CaptureError, pprof_reader
from otel_proflink.report.pprof_reader import Frame, ValueType, read_profile
from tests.support.pprof_schema import Profile, ProfileBuilder, samples

LEAF = ("Shop.price", "/app/shop.py", 12)
ROOT = ("<module>", "/app/main.py", 3)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def small() -> ProfileBuilder:
    builder = ProfileBuilder()
    builder.sample([LEAF, ROOT], (3, 20_000_000, 30_000_000), {"span_id": "ab", "thread_id": 7})
    return builder


def random_profile(seed: int) -> ProfileBuilder:
    chance = random.Random(seed)
    builder = ProfileBuilder(time_nanos=chance.randrange(1 << 62), period=chance.randrange(1 << 40))
    names = ["f", "Größe.<locals>.<lambda>", "名前", "a" * 300, "🦜.poll", ""]
    for _ in range(chance.randrange(60)):
        depth = chance.randrange(40)
        stack = [
            (chance.choice(names), f"/src/{chance.randrange(5)}.py", chance.randrange(-1, 9000))
            for _ in range(depth)
        ]
        values = [chance.choice((0, 1, -5, 1 << 62, chance.randrange(1 << 31))) for _ in range(3)]
        labels: dict[str, str | int] = {}
        for key in ("trace_id", "span_id", "thread_name", "thread_id"):
            if chance.random() < 0.7:
                labels[key] = chance.choice(("x" * 32, "y", 1, -7, 1 << 60))
        builder.sample(stack, values, labels)
    return builder


def flat(profile: pprof_reader.Profile) -> list[Any]:
    return [
        (tuple(map(tuple, s.stack.frames)), s.values, s.labels.strings, s.labels.numbers)
        for s in profile.samples
    ]


def test_everything_of_a_profile() -> None:
    profile = read_profile(small().encode(), name="x")
    assert profile.file == "x"
    assert profile.sample_types == (
        ValueType("samples", "count"),
        ValueType("cpu", "nanoseconds"),
        ValueType("wall", "nanoseconds"),
    )
    assert profile.time_nanos == 1_700_000_000_000_000_000
    assert profile.duration_nanos == 1_000_000_000
    assert profile.period == 10_000_000
    assert profile.period_type == ValueType("cpu", "nanoseconds")
    assert profile.default_sample_type == "cpu"
    (sample,) = profile.samples
    assert sample.stack.frames == (Frame(*LEAF), Frame(*ROOT))
    assert sample.values == (3, 20_000_000, 30_000_000)
    assert sample.labels.strings == {"span_id": "ab"}
    assert sample.labels.numbers == {"thread_id": 7}
    assert profile.value_index("wall", "nanoseconds") == 2


@pytest.mark.parametrize("seed", range(40))
def test_reads_what_the_protobuf_runtime_reads(seed: int) -> None:
    builder = random_profile(seed)
    expected = [
        (s.stack, tuple(s.values.values()), s.labels, s.numbers) for s in samples(builder.message)
    ]
    assert flat(read_profile(builder.encode(compress=bool(seed % 2)))) == expected


def test_samples_share_equal_stacks_and_label_sets() -> None:
    builder = ProfileBuilder()
    for cpu in (1, 2):
        builder.sample([LEAF, ROOT], (1, cpu, 1), {"span_id": "ab"})
    first, second = read_profile(builder.encode()).samples
    assert first.stack is second.stack
    assert first.labels is second.labels


def test_gzip_members_in_a_row_are_one_file() -> None:
    plain = small().encode(compress=False)
    data = gzip.compress(plain[:30]) + gzip.compress(plain[30:])
    assert len(read_profile(data).samples) == 1


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.pb.gz"
    path.write_bytes(small().encode())
    assert read_profile(path).file == str(path)
    assert len(read_profile(str(path)).samples) == 1


def test_string_table_may_stand_behind_what_points_into_it() -> None:
    message = small().message
    strings = Profile(string_table=message.string_table)
    message.ClearField("string_table")
    data = message.SerializeToString() + strings.SerializeToString()
    assert read_profile(data).samples[0].stack.frames[0] == Frame(*LEAF)


def test_fields_that_are_not_packed_and_not_in_order() -> None:
    # Go's encoder writes short lists number by number.
    builder = small()
    message = builder.message
    message.ClearField("sample")
    label = field(1, builder.string("span_id")) + field(2, builder.string("ab"))
    sample = field(3, label) + field(2, 3) + field(2, 4) + field(2, 5) + field(1, 2) + field(1, 1)
    data = builder.encode(compress=False) + field(2, sample) + field(2, sample)
    first, second = read_profile(data).samples
    assert first.stack.frames == (Frame(*ROOT), Frame(*LEAF))
    assert first.values == second.values == (3, 4, 5)
    assert first.labels.strings == second.labels.strings == {"span_id": "ab"}


def test_inlined_functions_and_bare_addresses_are_frames() -> None:
    builder = small()
    message = builder.message
    message.location[0].line.add(function_id=2, line=99)
    message.location.add(id=77, address=0xABC)
    message.sample[0].location_id.append(77)
    frames = read_profile(builder.encode()).samples[0].stack.frames
    assert frames == (
        Frame(*LEAF),
        Frame("<module>", "/app/main.py", 99),
        Frame(*ROOT),
        Frame("0xabc", "", 0),
    )


def test_a_sample_without_a_stack() -> None:
    builder = ProfileBuilder()
    builder.sample([], (1, 2, 3))
    (sample,) = read_profile(builder.encode()).samples
    assert sample.stack.frames == ()


def test_unknown_fields_are_skipped() -> None:
    extra = field(90, b"later") + field(91, 5) + varint(92 << 3 | 1) + bytes(8)
    data = small().encode(compress=False) + extra + varint(93 << 3 | 5) + bytes(4)
    assert len(read_profile(data).samples) == 1


def test_names_that_are_no_utf8_are_shown() -> None:
    data = small().encode(compress=False).replace(b"Shop.price", b"Shop.\xffrice")
    assert read_profile(data).samples[0].stack.frames[0].function == "Shop.\\xffrice"


def test_another_profile_s_sample_types() -> None:
    profile = read_profile(ProfileBuilder([("alloc", "bytes")]).encode(), name="heap.pb.gz")
    with pytest.raises(CaptureError, match=r"heap\.pb\.gz: .*cpu/nanoseconds.*alloc/bytes"):
        profile.value_index("cpu", "nanoseconds")


# --- files made to break it -----------------------------------------------------------------------


def refused(data: bytes, reason: str) -> None:
    with pytest.raises(CaptureError) as caught:
        read_profile(data, name="bad.pb.gz")
    assert str(caught.value).startswith("bad.pb.gz: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def broken(change: Any) -> bytes:
    builder = small()
    change(builder.message)
    return builder.encode(compress=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.sample[0].location_id.append(99), "location 99"),
        (lambda m: m.sample[0].value.append(1), "4 values instead of 3"),
        (lambda m: m.sample[0].ClearField("value"), "0 values instead of 3"),
        (lambda m: m.sample[0].label.add(key=999, num=1), "string 999"),
        (lambda m: m.sample[0].label.add(key=-1, num=1), "a label's key"),
        (lambda m: m.sample[0].label.add(num=1), "without a key"),
        (lambda m: m.sample[0].label.add(key=1, str=1 << 40), "label samples"),
        (lambda m: m.location[0].line.add(function_id=55), "function 55"),
        (lambda m: m.location.add(id=1), "location id 1"),
        (lambda m: m.location.add(), "location id 0"),
        (lambda m: m.function.add(id=1), "function id 1"),
        (lambda m: m.function.add(id=9, name=500), "the name of function 9"),
        (lambda m: m.function.add(id=9, filename=500), "the file of function 9"),
        (lambda m: m.sample_type.add(type=500), "sample type"),
        (lambda m: m.ClearField("sample_type"), "without a sample type"),
        (lambda m: m.ClearField("string_table"), "string table"),
        (lambda m: m.string_table.__setitem__(0, "x"), "string table"),
        (lambda m: setattr(m, "default_sample_type", 500), "default sample type"),
        (lambda m: setattr(m.period_type, "unit", 500), "string 500"),
    ],
)
def test_indexes_that_point_nowhere(change: Any, reason: str) -> None:
    refused(broken(change), reason)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "string table"),
        (b"\x1f\x8b", "cut short"),
        (b"\x1f\x8b\x08\x00garbage.............", "gzip"),
        (b"{}", "bad.pb.gz"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "cut short"),
        (b"\x48" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (b"\x48" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x48\xff\xff", "in the middle of a number"),
        (b"\x00\x01", "number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x12\x7f\x01", "runs over the end"),
        (field(2, 5), "wrong wire type"),
        (field(6, 5), "wrong wire type"),
        (field(9, b"12345678"), "wrong wire type"),
    ],
)
def test_bytes_that_are_no_profile(data: bytes, reason: str) -> None:
    refused(data, reason)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (field(1, b"\x01\x80") + field(2, b"\x01\x02\x03"), "middle of a number"),
        (field(1, b"\x01") + field(2, b"\xff" * 20), "more than 64 bits"),
        (field(1, b"\x01") + field(2, b"\xff" * 9 + b"\x7f"), "more than 64 bits"),
        (b"\x0a\x50\x01", "runs over the end of its sample"),
        (varint(1 << 3 | 5) + bytes(4), "wrong wire type"),
        (field(1, b"\x01") + field(2, b"\x01\x02\x03") + field(3, 5), "wrong wire type"),
        (field(1, b"\x01") + field(2, b"\x01\x02\x03") + field(3, field(1, b"x")), "of a label"),
    ],
)
def test_samples_that_are_none(sample: bytes, reason: str) -> None:
    refused(small().encode(compress=False) + field(2, sample), reason)


def test_every_cut_of_a_packed_file_is_refused() -> None:
    data = small().encode()
    for length in range(len(data)):
        with pytest.raises(CaptureError, match=r"^cut: "):
            read_profile(data[:length], name="cut")


def test_a_cut_plain_file_raises_nothing_else() -> None:
    # Between two fields, protobuf cannot tell that something is missing.
    data = small().encode(compress=False)
    for length in range(len(data)):
        with contextlib.suppress(CaptureError):
            read_profile(data[:length])


@pytest.mark.parametrize("seed", range(300))
def test_flipped_bytes_are_read_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(random_profile(seed % 7).encode(compress=False))
    for _ in range(chance.randrange(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    with contextlib.suppress(CaptureError):
        read_profile(bytes(data))


def test_a_gzip_bomb_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pprof_reader, "MAX_FILE_BYTES", 1 << 20)
    refused(gzip.compress(bytes(3 << 20)), "larger than 1 MiB once unpacked")


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pprof_reader, "MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "big.pb.gz"
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(CaptureError, match="larger than 1 MiB"):
        read_profile(path)


def test_too_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pprof_reader, "MAX_SAMPLES", 3)
    refused(small().encode(compress=False) + field(2, b"") * 3, "4 samples, more than 3")


def test_a_stack_that_explodes() -> None:
    # 2,000 inlined functions behind one location, 2,000 times in one stack: 4 million frames.
    message = small().message
    for _ in range(2000):
        message.location[0].line.add(function_id=1)
    message.sample[0].location_id.extend([1] * 2000)
    refused(message.SerializeToString(), "more frames than")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"none\.pb: No such file or directory"):
        read_profile(tmp_path / "none.pb")
    with pytest.raises(CaptureError, match="Is a directory"):
        read_profile(tmp_path)


def test_two_hundred_thousand_samples_in_seconds() -> None:
    chance = random.Random(1)
    builder = ProfileBuilder()
    stacks = [
        [(f"function_{chance.randrange(400)}", "app.py", chance.randrange(40)) for _ in range(30)]
        for _ in range(500)
    ]
    for number in range(10_000):
        span = {"trace_id": f"{number % 999:032x}", "thread_name": f"t-{number % 8}"}
        builder.sample(chance.choice(stacks), (1, chance.randrange(1 << 24), 10**7), span)
    again = Profile(sample=builder.message.sample).SerializeToString()
    data = builder.encode(compress=False) + again * 19
    started = time.process_time()
    assert len(read_profile(data).samples) == 200_000
    assert time.process_time() - started < 10  # about 1 s here
