# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, every variable, and the error that each bad value gets."""

from __future__ import annotations

import pickle

import pytest

from otel_proflink.config import Config, ConfigError

GOOD = [
    ("OTEL_PROFILES_EXPORTER", "pprof", "exporter", "pprof"),
    ("OTEL_PROFILES_EXPORTER", " NONE ", "exporter", "none"),
    ("OTEL_PROFLINK_OUTPUT_DIR", "some/where", "output_dir", "some/where"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "1", "sample_rate_hz", 1.0),
    ("OTEL_PROFLINK_SAMPLE_RATE", "97.5", "sample_rate_hz", 97.5),
    ("OTEL_PROFLINK_SAMPLE_RATE", "10000", "sample_rate_hz", 10_000.0),
    ("OTEL_PROFLINK_ENGINE", "cpu_timer", "engine", "cpu_timer"),
    ("OTEL_PROFLINK_MAX_FRAMES", "5", "max_frames", 5),
    ("OTEL_PROFLINK_EXPORT_INTERVAL", "100", "export_interval_ms", 100),
    ("OTEL_PROFLINK_OUTPUT_MAX_BYTES", "0", "output_max_bytes", 0),
    ("OTEL_PROFLINK_OUTPUT_MAX_AGE", "3600", "output_max_age_s", 3600),
    ("OTEL_PROFLINK_FLUSH_ON_SIGTERM", "True", "flush_on_sigterm", True),
    ("OTEL_PROFLINK_ENDPOINT_COLLECTION", "0", "endpoint_collection", False),
    ("OTEL_PROFLINK_SPAN_NAMES", "off", "span_names", False),
    ("OTEL_PROFLINK_SPAN_ATTRIBUTES", "no", "span_attributes", False),
    ("OTEL_PROFLINK_AWAIT_RATE", "0", "await_rate_hz", 0.0),
    ("OTEL_PROFLINK_AWAIT_RATE", "2.5", "await_rate_hz", 2.5),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "0.5", "max_overhead_percent", 0.5),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "", "max_overhead_percent", None),
    ("OTEL_PROFLINK_METRICS", "false", "metrics", False),
    ("OTEL_PROFLINK_START", "first_span", "start", "first_span"),
    ("OTEL_PROFLINK_ENABLED", "no", "enabled", False),
    ("OTEL_SDK_DISABLED", "TRUE", "enabled", False),
    # Only "true" disables the SDK (specification); other words are not ours to refuse.
    ("OTEL_SDK_DISABLED", "1", "enabled", True),
]

BAD = [
    ("OTEL_PROFLINK_ENABLED", "perhaps", "true or false"),
    ("OTEL_PROFILES_EXPORTER", "otlp", "file or pprof or none"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "fast", "1 to 10000"),
    ("OTEL_PROFLINK_ENGINE", "signals", "auto or sweep or cpu_timer"),
    ("OTEL_PROFLINK_MAX_FRAMES", "0", "1 to 1024"),
    ("OTEL_PROFLINK_MAX_FRAMES", "1025", "1 to 1024"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "0.5", "1 to 10000"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "10001", "1 to 10000"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "nan", "1 to 10000"),
    ("OTEL_PROFLINK_SAMPLE_RATE", "inf", "1 to 10000"),
    ("OTEL_PROFLINK_EXPORT_INTERVAL", "60s", "milliseconds"),
    ("OTEL_PROFLINK_EXPORT_INTERVAL", "99", "100 to 86400000"),
    ("OTEL_PROFLINK_OUTPUT_DIR", "a\0b", "a directory"),
    ("OTEL_PROFLINK_OUTPUT_MAX_BYTES", "-1", "bytes"),
    ("OTEL_PROFLINK_OUTPUT_MAX_BYTES", "1e6", "bytes"),
    ("OTEL_PROFLINK_OUTPUT_MAX_AGE", "-1", "seconds"),
    ("OTEL_PROFLINK_OUTPUT_MAX_AGE", "7d", "seconds"),
    ("OTEL_PROFLINK_FLUSH_ON_SIGTERM", "2", "true or false"),
    ("OTEL_PROFLINK_ENDPOINT_COLLECTION", "maybe", "true or false"),
    ("OTEL_PROFLINK_SPAN_NAMES", "some", "true or false"),
    ("OTEL_PROFLINK_SPAN_ATTRIBUTES", "2", "true or false"),
    ("OTEL_PROFLINK_AWAIT_RATE", "often", "from 0 (off) to 100"),
    ("OTEL_PROFLINK_AWAIT_RATE", "101", "from 0 (off) to 100"),
    ("OTEL_PROFLINK_AWAIT_RATE", "-1", "from 0 (off) to 100"),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "0.5%", "percentage of one core from 0.01 to 100"),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "0", "from 0.01 to 100"),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "101", "from 0.01 to 100"),
    ("OTEL_PROFLINK_MAX_OVERHEAD", "nan", "from 0.01 to 100"),
    ("OTEL_PROFLINK_METRICS", "some", "true or false"),
    ("OTEL_PROFLINK_START", "later", "auto or now or first_span"),
]


def test_defaults() -> None:
    config = Config.from_env({})
    assert config == Config()
    assert config.enabled
    assert config.exporter == "file"
    assert config.output_dir == "proflink-out"
    assert config.sample_rate_hz == 100
    assert config.export_interval_ms == 60_000
    assert not config.flush_on_sigterm
    assert config.endpoint_collection
    assert config.start == "auto"
    assert config.max_overhead_percent is None
    assert config.metrics
    assert config.output_max_bytes > 0
    assert config.output_max_age_s > 0


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD)
def test_each_variable(variable: str, text: str, field: str, value: object) -> None:
    assert getattr(Config.from_env({variable: text}), field) == value


@pytest.mark.parametrize(("variable", "text", "allowed"), BAD)
def test_each_bad_value_is_named(variable: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({variable: text})
    error = caught.value
    assert error.variable == variable
    assert allowed in error.allowed
    for part in (variable, error.allowed):
        assert part in str(error)
    assert str(error.value) in str(error).replace("\\x00", "\0")


@pytest.mark.parametrize("variable", sorted({row[0] for row in BAD}))
@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_variable_is_unset(variable: str, text: str) -> None:
    assert Config.from_env({variable: text}) == Config()


def test_switched_off_means_that_nothing_else_is_looked_at() -> None:
    bad = {"OTEL_PROFLINK_SAMPLE_RATE": "fast"}
    assert not Config.from_env({"OTEL_PROFLINK_ENABLED": "false", **bad}).enabled
    assert not Config.from_env({"OTEL_SDK_DISABLED": "true", **bad}).enabled


def test_values_given_in_code_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="OTEL_PROFLINK_SAMPLE_RATE=0 "):
        Config(sample_rate_hz=0)
    with pytest.raises(ConfigError, match="OTEL_PROFLINK_OUTPUT_DIR"):
        Config(output_dir="")


def test_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PROFLINK_SAMPLE_RATE", "250")
    assert Config.from_env().sample_rate_hz == 250


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("A", "b", "c")))
    assert (error.variable, error.value, error.allowed) == ("A", "b", "c")
