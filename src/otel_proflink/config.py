# SPDX-License-Identifier: Apache-2.0
"""All settings, read once from ``OTEL_*`` environment variables.

Every setting has one place, one default and one error. An empty variable counts as unset, as the
OpenTelemetry specification asks (configuration/sdk-environment-variables).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

ExporterName = Literal["file", "pprof", "none"]
StartMode = Literal["auto", "now", "first_span"]
EngineName = Literal["auto", "sweep", "cpu_timer"]

ENABLED: Final = "OTEL_PROFLINK_ENABLED"
SDK_DISABLED: Final = "OTEL_SDK_DISABLED"
EXPORTER: Final = "OTEL_PROFILES_EXPORTER"
OUTPUT_DIR: Final = "OTEL_PROFLINK_OUTPUT_DIR"
SAMPLE_RATE: Final = "OTEL_PROFLINK_SAMPLE_RATE"
ENGINE: Final = "OTEL_PROFLINK_ENGINE"
MAX_FRAMES: Final = "OTEL_PROFLINK_MAX_FRAMES"
EXPORT_INTERVAL: Final = "OTEL_PROFLINK_EXPORT_INTERVAL"
OUTPUT_MAX_BYTES: Final = "OTEL_PROFLINK_OUTPUT_MAX_BYTES"
OUTPUT_MAX_AGE: Final = "OTEL_PROFLINK_OUTPUT_MAX_AGE"
FLUSH_ON_SIGTERM: Final = "OTEL_PROFLINK_FLUSH_ON_SIGTERM"
ENDPOINT_COLLECTION: Final = "OTEL_PROFLINK_ENDPOINT_COLLECTION"
SPAN_NAMES: Final = "OTEL_PROFLINK_SPAN_NAMES"
SPAN_ATTRIBUTES: Final = "OTEL_PROFLINK_SPAN_ATTRIBUTES"
AWAIT_RATE: Final = "OTEL_PROFLINK_AWAIT_RATE"
MAX_OVERHEAD: Final = "OTEL_PROFLINK_MAX_OVERHEAD"
METRICS: Final = "OTEL_PROFLINK_METRICS"
START: Final = "OTEL_PROFLINK_START"

EXPORTERS: Final[tuple[ExporterName, ...]] = ("file", "pprof", "none")
START_MODES: Final[tuple[StartMode, ...]] = ("auto", "now", "first_span")
ENGINES: Final[tuple[EngineName, ...]] = ("auto", "sweep", "cpu_timer")

MIN_SAMPLE_RATE: Final = 1.0
# What the native side has room for (kMaxFrames in walk.hpp).
MOST_FRAMES: Final = 1024
MAX_SAMPLE_RATE: Final = 10_000.0
# Reading tasks takes the GIL, some 5 us each.
MAX_AWAIT_RATE: Final = 100.0
# Less than one tick a second costs cannot be held, more than one thread can burn cannot be missed.
MIN_MAX_OVERHEAD: Final = 0.01
MAX_MAX_OVERHEAD: Final = 100.0
# A shorter interval would spend more on encoding than on sampling; a day is a slip of the units.
MIN_EXPORT_INTERVAL_MS: Final = 100
MAX_EXPORT_INTERVAL_MS: Final = 24 * 60 * 60 * 1000

_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})

T = TypeVar("T")
_Choice = TypeVar("_Choice", bound=str)


class ConfigError(ValueError):
    """A setting with a value that is not allowed.

    Attributes:
        variable: name of the environment variable.
        value: what it holds.
        allowed: what it may hold, in words.
    """

    def __init__(self, variable: str, value: object, allowed: str) -> None:
        super().__init__(f"{variable}={value!r} is not allowed: expected {allowed}")
        self.variable = variable
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.variable, self.value, self.allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one profiler. Every value is checked when the object is made.

    Attributes:
        enabled: false when ``OTEL_PROFLINK_ENABLED=false`` or ``OTEL_SDK_DISABLED=true``.
        exporter: ``file`` (profiles and spans), ``pprof`` (profiles only) or ``none``.
        output_dir: the capture directory; a relative one is taken from the directory in which the
            profiler starts.
        sample_rate_hz: looks per second at every thread, 1 to 10000.
        engine: how threads are observed that burn CPU: ``sweep`` (a thread of ours reads them),
            ``cpu_timer`` (timers interrupt them with SIGPROF; ``sweep`` where that is taken) or
            ``auto``, which is ``sweep``; see docs/engines.md.
        max_frames: frames kept of a stack, 1 to 1024, half of them from either end; what is left
            out in the middle is counted in a frame of its own.
        export_interval_ms: milliseconds between two files, 100 to one day.
        output_max_bytes: size cap of our own files in the capture directory; 0 = none.
        output_max_age_s: age cap, in seconds, of our own files there; 0 = none.
        flush_on_sigterm: write what was sampled when SIGTERM arrives, then do what would have
            been done without us.
        endpoint_collection: add the ``endpoint`` label to samples.
        span_names: add the ``span_name`` label to samples: the active span's name at its start.
        span_attributes: give ended spans what was sampled of them, as ``proflink.*`` attributes.
        await_rate_hz: looks per second at asyncio tasks that wait, 0 to 100; 0 = none, and profiles
            without the sample type ``await``.
        max_overhead_percent: CPU that the sampler's thread may use, in percent of one core, 0.01 to
            100: with more to do than fits in, it looks less often, down to once a second. None =
            as much as the sample rate takes.
        metrics: offer OpenTelemetry metrics of the profiler itself to the global `MeterProvider`.
        start: ``now``; ``first_span``: at the first span of this process; ``auto``: ``first_span``
            in a process that only supervises forked workers, else ``now``.

    Raises:
        ConfigError: a value is out of range.
    """

    enabled: bool = True
    exporter: ExporterName = "file"
    output_dir: str = "proflink-out"
    sample_rate_hz: float = 100.0
    engine: EngineName = "auto"
    max_frames: int = 1024
    export_interval_ms: int = 60_000
    output_max_bytes: int = 256 * 1024 * 1024
    output_max_age_s: int = 7 * 24 * 60 * 60
    flush_on_sigterm: bool = False
    endpoint_collection: bool = True
    span_names: bool = True
    span_attributes: bool = True
    await_rate_hz: float = 10.0
    max_overhead_percent: float | None = None
    metrics: bool = True
    start: StartMode = "auto"

    def __post_init__(self) -> None:
        _one_of(EXPORTER, self.exporter, EXPORTERS)
        _one_of(START, self.start, START_MODES)
        _one_of(ENGINE, self.engine, ENGINES)
        if not 1 <= self.max_frames <= MOST_FRAMES:
            raise ConfigError(MAX_FRAMES, self.max_frames, _FRAMES_RANGE)
        if not self.output_dir or "\0" in self.output_dir:
            raise ConfigError(OUTPUT_DIR, self.output_dir, "the path of a directory")
        # `not low <= x <= high` also refuses NaN.
        if not MIN_SAMPLE_RATE <= self.sample_rate_hz <= MAX_SAMPLE_RATE:
            raise ConfigError(SAMPLE_RATE, self.sample_rate_hz, _RATE_RANGE)
        if not 0 <= self.await_rate_hz <= MAX_AWAIT_RATE:
            raise ConfigError(AWAIT_RATE, self.await_rate_hz, _AWAIT_RANGE)
        if self.max_overhead_percent is not None and not (
            MIN_MAX_OVERHEAD <= self.max_overhead_percent <= MAX_MAX_OVERHEAD
        ):
            raise ConfigError(MAX_OVERHEAD, self.max_overhead_percent, _OVERHEAD_RANGE)
        if not MIN_EXPORT_INTERVAL_MS <= self.export_interval_ms <= MAX_EXPORT_INTERVAL_MS:
            raise ConfigError(EXPORT_INTERVAL, self.export_interval_ms, _INTERVAL_RANGE)
        if self.output_max_bytes < 0:
            raise ConfigError(OUTPUT_MAX_BYTES, self.output_max_bytes, _BYTES_RANGE)
        if self.output_max_age_s < 0:
            raise ConfigError(OUTPUT_MAX_AGE, self.output_max_age_s, _AGE_RANGE)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the settings from `environ` (default: ``os.environ``).

        Raises:
            ConfigError: names the first variable with a value that is not allowed.
        """
        env = os.environ if environ is None else environ
        # The SDK's own switch follows the specification: only "true" is true, nothing is refused.
        sdk_disabled = env.get(SDK_DISABLED, "").strip().lower() == "true"
        if sdk_disabled or not _get(env, ENABLED, True, _boolean):
            # Switched off means off: the other settings, right or wrong, are not looked at.
            return cls(enabled=False)
        default = cls()
        return cls(
            exporter=_get(env, EXPORTER, default.exporter, _choice(EXPORTERS)),
            output_dir=_get(env, OUTPUT_DIR, default.output_dir, _text),
            sample_rate_hz=_get(env, SAMPLE_RATE, default.sample_rate_hz, _number(_RATE_RANGE)),
            max_frames=_get(env, MAX_FRAMES, default.max_frames, _whole(_FRAMES_RANGE)),
            engine=_get(env, ENGINE, default.engine, _choice(ENGINES)),
            export_interval_ms=_get(
                env, EXPORT_INTERVAL, default.export_interval_ms, _whole(_INTERVAL_RANGE)
            ),
            output_max_bytes=_get(
                env, OUTPUT_MAX_BYTES, default.output_max_bytes, _whole(_BYTES_RANGE)
            ),
            output_max_age_s=_get(
                env, OUTPUT_MAX_AGE, default.output_max_age_s, _whole(_AGE_RANGE)
            ),
            flush_on_sigterm=_get(env, FLUSH_ON_SIGTERM, default.flush_on_sigterm, _boolean),
            endpoint_collection=_get(
                env, ENDPOINT_COLLECTION, default.endpoint_collection, _boolean
            ),
            span_names=_get(env, SPAN_NAMES, default.span_names, _boolean),
            span_attributes=_get(env, SPAN_ATTRIBUTES, default.span_attributes, _boolean),
            await_rate_hz=_get(env, AWAIT_RATE, default.await_rate_hz, _number(_AWAIT_RANGE)),
            max_overhead_percent=_get(env, MAX_OVERHEAD, None, _number(_OVERHEAD_RANGE)),
            metrics=_get(env, METRICS, default.metrics, _boolean),
            start=_get(env, START, default.start, _choice(START_MODES)),
        )


_FRAMES_RANGE: Final = "a whole number of frames from 1 to 1024"
_RATE_RANGE: Final = "a number of samples per second from 1 to 10000"
_AWAIT_RANGE: Final = "a number of looks per second from 0 (off) to 100"
_OVERHEAD_RANGE: Final = "a percentage of one core from 0.01 to 100, or nothing for no limit"
_INTERVAL_RANGE: Final = "a whole number of milliseconds from 100 to 86400000"
_BYTES_RANGE: Final = "a whole number of bytes, 0 for no limit"
_AGE_RANGE: Final = "a whole number of seconds, 0 for no limit"

# A parser gets the variable's name (for its error) and the stripped, non-empty text.
_Parser = Callable[[str, str], T]


def _get(env: Mapping[str, str], variable: str, default: T, parse: _Parser[T]) -> T:
    text = env.get(variable, "").strip()
    return parse(variable, text) if text else default


def _text(variable: str, text: str) -> str:
    return text


def _boolean(variable: str, text: str) -> bool:
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ConfigError(variable, text, "true or false")


def _number(allowed: str) -> _Parser[float]:
    def parse(variable: str, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(variable, text, allowed) from None

    return parse


def _whole(allowed: str) -> _Parser[int]:
    def parse(variable: str, text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(variable, text, allowed) from None

    return parse


def _choice(choices: tuple[_Choice, ...]) -> _Parser[_Choice]:
    def parse(variable: str, text: str) -> _Choice:
        return _one_of(variable, text.lower(), choices)

    return parse


def _one_of(variable: str, value: str, choices: tuple[_Choice, ...]) -> _Choice:
    for choice in choices:
        if value == choice:
            return choice
    raise ConfigError(variable, value, " or ".join(choices))
