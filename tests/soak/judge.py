# SPDX-License-Identifier: Apache-2.0
"""Holds the profiles of a soak against what the program can have done.

The profiles are the only witness. A name, a line, or a caller that the sources do not have is an
error; so is a chain that ends anywhere but where a thread of this program begins.
"""

from __future__ import annotations

import itertools
import linecache
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

from tests.soak import units
from tests.support import pprof_schema

Frame = tuple[str, str, int, int]  # function, file, line, first line of the function
Code = tuple[str, int]  # qualified name, first line

_EXAMPLES = 20
_HERE = str(Path(__file__).parent)
# Where a chain may end: the program itself, a thread, one made by hand, a greenlet. A greenlet's
# frames stand for themselves: those of whoever switched to it are not below them.
_ROOTS = {
    "_run_module_as_main",
    "Thread._bootstrap",
    "bare_thread",
    "greenlet_main",
    "_check_threads.<locals>.wait",  # the self-test's, when it has not ended yet
}
# A task that waits is on no thread: its chain ends at its first coroutine.
_TASK_ROOTS = {"many_tasks", "one_task", "sleep"}
# Code of others that calls ours, and what of ours.
_ENTRIES = {
    "Thread.run": {"worker_main", "run_unit"},
    "_run_code": {"<module>"},
    "Handle._run": {"one_task", "many_tasks"},
    "_WorkItem.run": {"call_unit"},
    "WorkerContext.run": {"call_unit"},  # 3.14+
    "Tracer.start_span": {"generate_trace_id", "generate_span_id"},
    "_GeneratorContextManagerBase.__init__": {"spans"},
    "_GeneratorContextManager.__enter__": {"spans"},
    "_GeneratorContextManager.__exit__": {"spans"},
}
# Run wherever the interpreter collects garbage; no line names it.
_ANYWHERE = {"__del__"}


def lines_by_code(source: str, file: str) -> dict[Code, set[int]]:
    """Of each code object in a source, the lines that may be executing."""
    found: dict[Code, set[int]] = {}
    waiting: list[CodeType] = [compile(source, file, "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        lines = found.setdefault((code.co_qualname, code.co_firstlineno), {code.co_firstlineno})
        lines.update(line for _, _, line in code.co_lines() if line is not None)
        waiting.extend(const for const in code.co_consts if isinstance(const, CodeType))
    return found


@dataclass
class Judge:
    """Counts over all profiles that were read."""

    seen: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    cpu_ns: Counter[int] = field(default_factory=Counter)  # of the main process, by thread id
    wall_ns: Counter[int] = field(default_factory=Counter)
    _codes: dict[str, dict[Code, set[int]] | None] = field(default_factory=dict)

    def fault(self, kind: str, example: object, count: int = 1) -> None:
        self.faults[kind] += count
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(str(example))

    def read(self, data: bytes, main_process: bool) -> None:
        """One exported profile."""
        message = pprof_schema.decode(data)
        text = list(message.string_table)
        functions = {f.id: (text[f.name], text[f.filename], f.start_line) for f in message.function}
        places: dict[int, Frame] = {}
        for location in message.location:
            name, file, first = functions[location.line[0].function_id]
            places[location.id] = (name, file, location.line[0].line, first)
        numbers: dict[int, int] = {}
        for identity, frame in places.items():
            self._judge_frame(frame)
            number = units.number_of(frame[1])
            # The module's own code makes the two functions, before there are spans.
            if number is not None and frame[0] != "<module>":
                numbers[identity] = number
        pairs: set[tuple[int, int]] = set()
        for sample in message.sample:
            ids = list(sample.location_id)
            pairs.update(itertools.pairwise(ids))
            labels = {text[x.key]: text[x.str] if x.str else x.num for x in sample.label}
            self._judge_sample(sample, places, ids, labels, main_process)
            if not numbers.keys().isdisjoint(ids):
                number = next(numbers[i] for i in ids if i in numbers)
                self._judge_label(number, labels, sample.value[0])
        for callee, caller in pairs:
            self._judge_pair(places[callee], places[caller])
        self.seen["profiles"] += 1
        self.seen["pairs"] += len(pairs)
        self.seen["units"] += len(set(numbers.values()))

    def _judge_sample(
        self,
        sample: Any,
        places: dict[int, Frame],
        ids: list[int],
        labels: dict[str, Any],
        main_process: bool,
    ) -> None:
        count, cpu, wall = sample.value[:3]
        root = places[ids[-1]][0] if ids else "nothing"
        waits = "thread_id" not in labels
        if len(ids) == 1 and root.startswith("["):
            if root not in ("[unreadable]", "[no Python frame]"):
                self.fault("a table that is full", root, count)
            self.seen[root] += count
        elif root not in (_TASK_ROOTS if waits else _ROOTS):
            self.fault("unknown root", [places[i] for i in ids], count)
        self.seen["waiting tasks" if waits else "samples"] += max(count, 1)
        self.seen["deepest"] = max(self.seen["deepest"], len(ids))
        if main_process and not waits:
            self.cpu_ns[labels["thread_id"]] += cpu
            self.wall_ns[labels["thread_id"]] += wall

    def _judge_label(self, number: int, labels: dict[str, Any], count: int) -> None:
        if labels.get("link") == "unknown":
            self.seen["unknown labels"] += count
            return
        try:
            fault = units.fault_of_label(number, labels)
        except KeyError:
            fault = "no label in a span"
        if fault is not None:
            self.fault(f"wrong label: {fault}", (number, labels), count)
        self.seen["labels"] += count

    def _judge_frame(self, frame: Frame) -> None:
        name, file, line, first = frame
        if not file:
            if not name.startswith("["):
                self.fault("a function without a file", frame)
            return
        lines = self._codes_of(file)
        if lines is None:
            return
        self.seen["lines"] += 1
        known = lines.get((name, first))
        if known is None:
            self.fault("wrong name", frame)
        elif line not in known:
            self.fault("wrong line", frame)

    def _codes_of(self, file: str) -> dict[Code, set[int]] | None:
        """None: there is no source to compare with."""
        number = units.number_of(file)
        if number is not None:
            return lines_by_code(units.source(number), file)
        if file not in self._codes:
            lines = linecache.getlines(file)
            self._codes[file] = lines_by_code("".join(lines), file) if lines else None
        return self._codes[file]

    def _judge_pair(self, callee: Frame, caller: Frame) -> None:
        name = callee[0].rpartition(".")[2]
        if callee[0] in _ROOTS - {"bare_thread"}:
            if caller[0] != "greenlet_main" or callee[0] == "_run_module_as_main":
                self.fault("impossible caller", (callee, caller))
            return
        number = units.number_of(callee[1])
        if number is not None:
            outer, made = units.names(number)
            callers = {
                "<module>": ("Units.make", units.__file__),
                outer: ("call_unit", units.__file__),
                made: (outer, callee[1]),
            }
            right = caller[:2] == callers.get(name)
        elif not callee[1].startswith(_HERE) or name in _ANYWHERE:
            return
        elif caller[1].startswith(_HERE):
            line = linecache.getline(caller[1], caller[2])
            # What is in angle brackets has no name that a line could hold.
            named = callee[0].rpartition(".")[0] if name == "__init__" else name
            # What is in angle brackets has no name that a line could hold.
            right = named in line or name.startswith("<") or "self.step(" in line
        else:
            right = name in _ENTRIES.get(caller[0], ())
        if not right:
            self.fault("impossible caller", (callee, caller))
