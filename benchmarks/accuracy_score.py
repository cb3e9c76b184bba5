# SPDX-License-Identifier: Apache-2.0
"""Profiles held against what the workload knows: right, wrong, unknown, and CPU per span."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.accuracy_truth import PREFIX
from otel_proflink.report.pprof_reader import Profile, read_profile

_UNSIGNED = (1 << 64) - 1
#: Samples that are due to a span on average, or its total says more of chance than of a profiler.
MIN_PER_SPAN = 300


class Seen(NamedTuple):
    """One on-CPU sample, the same for all profilers; ids are 0 where there is no label.

    `unread`: the profiler says that it could not read the label, or the whole thread.
    """

    unit: str | None
    samples: int
    cpu_ns: int
    span_id: int
    root_id: int
    unread: bool = False


@dataclass
class Score:
    """The figures of one scenario under one profiler.

    Attributes:
        samples: on-CPU samples of units.
        right: those with the right span, or rightly without.
        wrong: those with another span, or with one where there is none.
        unknown: those without a label where there is a span, and those that could not be read,
            whatever it was that they would have shown.
        roots_right: of the samples with a label, where there is a span: those with the right root.
        roots_wrong: and the others.
        cpu_share: CPU that is charged to the right span in the right unit, over what was burnt.
        cpu_error: sum of the absolute errors of the spans' CPU totals, over the sum of the totals;
            None where spans are too short to have any (`MIN_PER_SPAN`).
    """

    samples: int = 0
    right: int = 0
    wrong: int = 0
    unknown: int = 0
    roots_right: int = 0
    roots_wrong: int = 0
    cpu_share: float = 0.0
    cpu_error: float | None = None

    @property
    def right_share(self) -> float | None:
        """Right over right and wrong; None without samples."""
        known = self.right + self.wrong
        return self.right / known if known else None

    @property
    def root_share(self) -> float | None:
        """The same of local roots; None if the profiler has no such thing."""
        known = self.roots_right + self.roots_wrong
        return self.roots_right / known if known else None

    @property
    def unknown_share(self) -> float:
        """Unknown over all samples."""
        return self.unknown / self.samples if self.samples else 0.0


def score(directory: Path, profiler: str, pushed: Iterable[bytes], rate_hz: float) -> Score:
    """Read what a scenario left in `directory`, and what was sent to the sink.

    `rate_hz` is what the profiler was asked for.

    Raises:
        CaptureError: a file is no profile.
        ValueError: there is nothing to read.
    """
    truth = json.loads((directory / "truth.json").read_text(encoding="utf-8"))
    seen = list(_SEEN[profiler](directory, pushed))
    if not seen:
        raise ValueError("no profile, or an empty one")
    return compare(seen, truth["units"], rate_hz=rate_hz, has_roots=profiler != "pyroscope")


def compare(
    seen: Iterable[Seen],
    units: Iterable[tuple[str, int, int, int]],
    *,
    rate_hz: float,
    has_roots: bool,
) -> Score:
    """Score samples by the unit in whose function they are."""
    expected = {name: (span_id, root_id) for name, span_id, root_id, _ in units}
    burnt: defaultdict[int, int] = defaultdict(int)
    for _, span_id, _, cpu_ns in units:
        if span_id:
            burnt[span_id] += cpu_ns
    charged: defaultdict[int, int] = defaultdict(int)
    found = Score()
    right_cpu = 0
    for sample in seen:
        # A total is what anybody would add up: all samples of a span, wherever they are.
        charged[sample.span_id] += sample.cpu_ns
        if sample.unread:
            found.samples += sample.samples
            found.unknown += sample.samples
            continue
        if sample.unit is None:
            continue
        span_id, root_id = expected[sample.unit]
        found.samples += sample.samples
        if span_id and not sample.span_id:
            found.unknown += sample.samples
            continue
        if sample.span_id == span_id:
            found.right += sample.samples
            right_cpu += sample.cpu_ns if span_id else 0
        else:
            found.wrong += sample.samples
        if span_id and has_roots:
            if sample.root_id == root_id:
                found.roots_right += sample.samples
            else:
                found.roots_wrong += sample.samples
    total = sum(burnt.values())
    found.cpu_share = right_cpu / total
    # CPU charged to a span that no unit was under is an error as well.
    charged.pop(0, None)
    spans = burnt.keys() | charged.keys()
    if total / 1e9 * rate_hz >= MIN_PER_SPAN * len(burnt):
        found.cpu_error = sum(abs(charged[span] - burnt[span]) for span in spans) / total
    return found


# -- profilers ------------------------------------------------------------------------------------


def _unit_in(functions: Iterable[str]) -> str | None:
    return next((name for name in functions if name.startswith(PREFIX)), None)


def _proflink(directory: Path, _pushed: Iterable[bytes]) -> Iterator[Seen]:
    for file in directory.glob("profile-*.pb.gz"):
        profile = read_profile(file)
        count = profile.value_index("samples", "count")
        cpu = profile.value_index("cpu", "nanoseconds")
        for sample in profile.samples:
            if sample.values[cpu] > 0:
                labels = sample.labels.strings
                yield Seen(
                    _unit_in(frame.function for frame in sample.stack.frames),
                    sample.values[count],
                    sample.values[cpu],
                    int(labels.get("span_id", "0"), 16),
                    int(labels.get("local_root_span_id", "0"), 16),
                    labels.get("link") == "unknown",
                )


def _ddtrace(directory: Path, _pushed: Iterable[bytes]) -> Iterator[Seen]:
    for file in directory.glob("*.pb"):
        profile = read_profile(file)
        count = profile.value_index("cpu-samples", "count")
        cpu = profile.value_index("cpu-time", "nanoseconds")
        for sample in profile.samples:
            if sample.values[cpu] > 0:
                numbers = sample.labels.numbers
                yield Seen(
                    _unit_in(frame.function for frame in sample.stack.frames),
                    sample.values[count],
                    sample.values[cpu],
                    numbers.get("span id", 0) & _UNSIGNED,
                    numbers.get("local root span id", 0) & _UNSIGNED,
                )


def _pyroscope(_directory: Path, pushed: Iterable[bytes]) -> Iterator[Seen]:
    for body in pushed:
        for profile in _pushed_profiles(body):
            cpu = profile.value_index("cpu", "nanoseconds")
            for sample in profile.samples:
                yield Seen(
                    _unit_in(frame.function for frame in sample.stack.frames),
                    round(sample.values[cpu] / profile.period),
                    sample.values[cpu],
                    int(sample.labels.strings.get("span_id", "0"), 16),
                    0,
                )


_SEEN = {
    "proflink": _proflink,
    "cpu_timer": _proflink,
    "ddtrace": _ddtrace,
    "pyroscope": _pyroscope,
}


def _pushed_profiles(body: bytes) -> Iterator[Profile]:
    """The profiles of a `push.v1.PushRequest`."""
    if body[:2] == b"\x1f\x8b":
        body = gzip.decompress(body)
    for series in _messages(body, 1):
        for raw_sample in _messages(series, 2):
            for raw_profile in _messages(raw_sample, 1):
                yield read_profile(raw_profile)


def _messages(data: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited fields number `wanted` of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            varint()
        elif tag & 7 == 2:
            size = varint()
            if tag >> 3 == wanted:
                yield data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7}")
