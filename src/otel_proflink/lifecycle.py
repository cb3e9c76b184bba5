# SPDX-License-Identifier: Apache-2.0
"""What a process runs: at most one engine, and what ends, forks or kills it.

Order at a normal exit: the interpreter joins the non-daemon threads (and with them every executor),
then calls the atexit handlers, newest first. Ours is registered when the profiler starts: after the
SDK's own and before most of the application's, which therefore are still profiled. It runs while
every thread, the daemon exporter thread too, still can.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from . import server_exits
from .config import Config
from .engine import Engine
from .sampling import SamplerUnavailableError, load_sampler
from .self_metrics import SelfMetrics
from .span_inbox import SpanInbox

logger = logging.getLogger(__name__)

#: Seconds that the end of the process may be delayed by the last export.
EXIT_TIMEOUT_S: Final = 5.0
#: The same after SIGTERM: orchestrators commonly kill 10 s later.
SIGTERM_TIMEOUT_S: Final = 3.0


class _Process:
    """The state of this process. Made anew, as far as locks go, in a forked child."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.inbox: Final = SpanInbox()
        self.engine: Engine | None = None
        #: the one that has been told to stop and may still be exporting
        self.stopping: Engine | None = None
        #: those that asked for the engine, in order of their coming; it runs until the last goes.
        self.users: list[object] = []
        #: pid of the process in which one was started, or tried, last
        self.ran_in = 0
        self.hooked = False
        self.hooked_multiprocessing = False
        #: the SIGTERM handler that we took the place of
        self.previous_sigterm: Callable[[int, FrameType | None], Any] | int | None = None
        self.sigterm_hooked = False
        self.last_refusal = ""
        self.metrics: Final = SelfMetrics(_observed)


def _observed() -> Engine | None:
    """The engine that the metrics are of: one that runs in this process, or none.

    Not by `engine`: whoever collects right after a fork must not be the one who starts things.
    """
    running = _process.engine
    if running is None or running.pid != os.getpid() or not running.config.metrics:
        return None
    return running


_process: Final = _Process()
#: of the ended spans; closed while nothing runs
inbox: Final = _process.inbox


def refuse(reason: str, level: int = logging.ERROR) -> None:
    """Log, once, why profiling is off; the same reason is not logged twice in a row."""
    if reason != _process.last_refusal:
        _process.last_refusal = reason
        logger.log(
            level,
            "otel-proflink does not profile this process: %s. Linking and the application go on",
            reason,
        )


def engine(*, restart: bool = True) -> Engine | None:
    """The engine that runs in this process, or None.

    Args:
        restart: whether it is to run on in a process that was forked without a word to Python.
    """
    running = _process.engine
    if running is not None and running.pid != os.getpid():
        # Forked by C code that does not tell Python (uWSGI does): do now what the hook would have.
        _after_fork_in_child(restart=restart)
        running = _process.engine
    return running


def attach(user: object, config: Config) -> bool:
    """Let `user` have the engine, starting it if none runs.

    A second user shares the engine that runs, with the settings of the first.

    Returns:
        Whether one runs now. If not, the reason has been logged.
    """
    engine()  # notice a fork first
    config = _anchored(config)
    with _process.lock:
        if _process.engine is None:
            started = _start(config)
            if started is None:
                return False
            _process.engine = started
            _process.last_refusal = ""
        elif config != _process.engine.config:
            logger.info("otel-proflink runs already: its settings stay as they are")
        if user not in _process.users:
            _process.users.append(user)
        _hook_process()
        if config.flush_on_sigterm:
            hook_sigterm()
        offered = _process.engine.config.metrics
    if offered:
        _process.metrics.offer()
    return True


def detach(user: object, timeout_s: float) -> bool:
    """Take back `attach`. The last user's going stops the engine; another's flushes it.

    Returns:
        Whether all that was sampled has been exported within `timeout_s` seconds.
    """
    engine()
    with _process.lock:
        if user in _process.users:
            _process.users.remove(user)
        running = _process.engine
        if running is None:
            return True
        if _process.users:
            return running.flush(timeout_s)
        return _stop(running, timeout_s)


def stop_all(timeout_s: float) -> bool:
    """Stop the engine whoever uses it. Returns as `detach` does."""
    engine(restart=False)
    with _process.lock:
        _process.users.clear()
        running = _process.engine
        return running is None or _stop(running, timeout_s)


def is_attached(user: object) -> bool:
    """Whether `user` has an engine that runs in this process."""
    return engine() is not None and user in _process.users


def first_user() -> object | None:
    """Who started the engine that runs."""
    return _process.users[0] if engine() is not None and _process.users else None


def _anchored(config: Config) -> Config:
    """With an absolute directory: child processes may start elsewhere, and write to the same."""
    try:
        return dataclasses.replace(config, output_dir=os.path.abspath(config.output_dir))
    except OSError:  # the working directory is gone; the exporter will say so
        return config


def has_run() -> bool:
    """Whether an engine was started in this process, be it in vain or stopped since."""
    return _process.ran_in == os.getpid()


def _start(config: Config) -> Engine | None:
    _process.ran_in = os.getpid()
    try:
        sampler = load_sampler()
    except SamplerUnavailableError as error:
        refuse(str(error))
        return None
    try:
        started = Engine(config, sampler, _process.inbox)
        started.start()
    except sampler.SamplerError as error:
        # Nobody's mistake: an interpreter that it does not know, a kernel that refuses.
        refuse(str(error), logging.WARNING)
        return None
    except Exception as error:
        refuse(f"it could not start ({type(error).__name__}: {error})")
        return None
    return started


def _stop(running: Engine, timeout_s: float) -> bool:
    _process.stopping = running
    _process.engine = None
    try:
        return running.stop(timeout_s)
    finally:
        _process.stopping = None
        # Only now: whoever ends a process politely may lose patience while it exports.
        unhook_sigterm()
        _process.metrics.finished(running.stats())


# -- exit and fork --------------------------------------------------------------------------------


def _hook_process() -> None:
    """Register for the end of the process and for its forks, once; neither can be taken back."""
    if _process.hooked:
        return
    _process.hooked = True
    atexit.register(_at_exit)
    server_exits.watch(_before_sudden_exit)
    os.register_at_fork(before=_hook_multiprocessing, after_in_child=_after_fork_in_child)
    _hook_multiprocessing()
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        # Started in the middle of such a child: its after-fork registry has been run already.
        _in_multiprocessing_child(_process)


def _at_exit() -> None:
    try:
        stop_all(EXIT_TIMEOUT_S)
    except Exception:
        logger.debug("the last export failed", exc_info=True)


def _before_sudden_exit() -> None:
    running = _process.engine
    if running is not None and running.pid == os.getpid():
        try:
            running.flush(SIGTERM_TIMEOUT_S)
        except Exception:
            logger.debug("the last export failed", exc_info=True)


def _hook_multiprocessing() -> None:
    # multiprocessing's children leave by os._exit, and run only multiprocessing's own finalizers.
    # Those are cleared after the fork hooks have run, and in a child of its fork server after the
    # main module was imported, hence its own after-fork registry.
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _process.hooked_multiprocessing:
        try:
            util.register_after_fork(_process, _in_multiprocessing_child)
            _process.hooked_multiprocessing = True
        except Exception:
            logger.debug("no last export in children of multiprocessing", exc_info=True)


def _in_multiprocessing_child(process: _Process) -> None:
    from multiprocessing.util import Finalize

    # The lowest priority: after the finalizers of queues and pools.
    Finalize(None, _at_exit, exitpriority=-1_000_000)


def _after_fork_in_child(*, restart: bool = True) -> None:
    """The child starts clean: the parent sends the parent's data, the child its own."""
    try:
        # Whoever held it in the parent does not exist here.
        _process.lock = threading.RLock()
        _process.metrics.forget()
        parents, _process.engine = _process.engine, None
        if parents is None:
            _process.inbox.forget()
            return
        parents.abandon()
        if restart:
            _process.engine = _start(parents.config)
    except Exception:
        logger.debug("profiling does not go on in this child", exc_info=True)


# -- SIGTERM --------------------------------------------------------------------------------------


def hook_sigterm() -> None:
    """Flush when SIGTERM arrives, then go on as without us. Off unless the setting asks for it."""
    previous = signal.getsignal(signal.SIGTERM)
    # Servers reset it in their workers. Over a handler of theirs we cannot go a second time: it may
    # chain to ours.
    if _process.sigterm_hooked and previous != signal.SIG_DFL:
        return
    if previous == signal.SIG_IGN:
        return  # the process wants to survive it, and to be asked again would change that
    reason = None
    if previous is None:
        reason = "another library handles SIGTERM below Python"
    else:
        try:
            _process.previous_sigterm = previous
            signal.signal(signal.SIGTERM, _on_sigterm)
            _process.sigterm_hooked = True
        except ValueError:  # not in the main thread of the main interpreter
            reason = "the profiler was not started in the main thread"
    if reason is not None:
        logger.warning("otel-proflink cannot flush on SIGTERM: %s", reason)


def unhook_sigterm() -> None:
    """Put the previous handler back, if ours is still the one in place."""
    if not _process.sigterm_hooked:
        return
    try:
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, _process.previous_sigterm)
        _process.sigterm_hooked = False
    except ValueError:
        pass  # only the main thread may; without an engine the handler merely chains


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    # Takes no lock: the thread that it interrupts may hold any.
    running = _process.engine or _process.stopping
    if running is not None and running.pid == os.getpid():
        running.flush(SIGTERM_TIMEOUT_S)
    previous = _process.previous_sigterm
    if callable(previous):
        previous(signum, frame)
    elif previous == signal.SIG_DFL:
        # The default action, so that whoever waits for this process sees what killed it.
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
