# SPDX-License-Identifier: Apache-2.0
"""The profiler in hand: `Profiler`, `start`, `stop`, `get`."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING, Final

from . import lifecycle
from .config import Config, ConfigError
from .supervisors import only_supervises

if TYPE_CHECKING:
    from .stats import ProfilerStats

logger = logging.getLogger(__name__)

#: seconds
DEFAULT_FLUSH_TIMEOUT_S: Final = 30.0
DEFAULT_STOP_TIMEOUT_S: Final = 10.0


class Profiler:
    """Samples this process and writes what it saw.

    One profiler runs in a process. Starting another one attaches it to the one that runs, with the
    settings of the first; sampling ends when the last of them stops, or at interpreter exit. In a
    forked child a running profiler goes on by itself, with data and files of its own.

    Nothing raises into the application: when profiling is not possible (a bad setting, an
    interpreter that the sampler does not know), one line is logged and `running` stays false.

    Args:
        config: the settings; default: those of the environment at `start`.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._config = config

    def settings(self) -> Config | None:
        """The settings that `start` would use; None, after one log line, if one of them is bad."""
        if self._config is not None:
            return self._config
        try:
            return Config.from_env()
        except ConfigError as error:
            lifecycle.refuse(str(error))
            return None

    @property
    def running(self) -> bool:
        """Whether samples are being taken for this profiler."""
        return lifecycle.is_attached(self)

    def start(self) -> Profiler:
        """Start sampling; when this profiler runs, nothing happens.

        Returns:
            Itself, so that ``profiler = Profiler().start()`` reads well.
        """
        try:
            config = self.settings()
            if config is not None and config.enabled:
                lifecycle.attach(self, config)
        except Exception:
            logger.exception("otel-proflink could not start; the application goes on")
        return self

    def flush(self, timeout_s: float = DEFAULT_FLUSH_TIMEOUT_S) -> bool:
        """Export what has been sampled so far.

        Args:
            timeout_s: seconds to wait for it.

        Returns:
            Whether all of it reached its destination in time; true when nothing runs.
        """
        try:
            engine = lifecycle.engine()
            return engine is None or engine.flush(timeout_s)
        except Exception:
            logger.debug("flush failed", exc_info=True)
            return False

    def stop(self, timeout_s: float = DEFAULT_STOP_TIMEOUT_S) -> bool:
        """Export what has been sampled; stop sampling unless another profiler is still attached.

        Args:
            timeout_s: seconds to wait for the export.

        Returns:
            Whether all of it reached its destination in time; true when nothing runs.
        """
        try:
            return lifecycle.detach(self, timeout_s)
        except Exception:
            logger.debug("stop failed", exc_info=True)
            return False

    def stats(self) -> ProfilerStats:
        """What the sampler and the exports have done since they started, and what they cost.

        Returns:
            See `otel_proflink.stats.ProfilerStats`; empty when nothing runs.
        """
        try:
            engine = lifecycle.engine()
            if engine is None:
                return {}
            return {**engine.stats(), "memory_bytes": engine.memory_bytes()}
        except Exception:
            logger.debug("stats failed", exc_info=True)
            return {}

    def __enter__(self) -> Profiler:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def start(config: Config | None = None) -> Profiler:
    """Start profiling this process.

    Returns:
        The profiler that runs; the one that ran already, if so. One that does not run
        (`Profiler.running`) when profiling is not possible here.
    """
    return get() or Profiler(config).start()


def stop(timeout_s: float = DEFAULT_STOP_TIMEOUT_S) -> bool:
    """Stop profiling this process, whoever started it. Returns as `Profiler.stop` does."""
    try:
        return lifecycle.stop_all(timeout_s)
    except Exception:
        logger.debug("stop failed", exc_info=True)
        return False


def get() -> Profiler | None:
    """The profiler that runs in this process, or None."""
    user = lifecycle.first_user()
    return user if isinstance(user, Profiler) else None


def waits_for_first_span(config: Config) -> bool:
    """Whether sampling is to begin at the first local span only (``OTEL_PROFLINK_START``)."""
    return config.start == "first_span" or (config.start == "auto" and only_supervises())
