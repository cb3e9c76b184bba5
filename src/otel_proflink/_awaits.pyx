# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Where an asyncio task waits: its chain of coroutines, read with the GIL, booked without it.

Nothing here runs Python code between the first and the last coroutine of a task (their attributes
are C getters), so the GIL is not given up in between and what is read belongs together.
"""

from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from otel_proflink._linker cimport Link, LinkRecord

from types import AsyncGeneratorType, CoroutineType, GeneratorType

from otel_proflink._linker import link_in, task_number

cdef extern from "sampler.hpp" namespace "otel_proflink" nogil:
    cdef cppclass AwaitFrame:
        const char* name
        uint32_t name_size
        const char* file
        uint32_t file_size
        int32_t first_line
        int32_t line

    cdef cppclass AwaitSample:
        const AwaitFrame* frames
        uint32_t count
        const LinkRecord* record
        uint64_t serial
        uint64_t task
        uint64_t wait_ns

    void sampler_add_awaits(const AwaitSample*, size_t) noexcept

# As in the native part; a longer chain loses the coroutines that wait for the others.
cdef int _DEPTH = 128

cdef object _coroutine = CoroutineType
cdef object _generator = GeneratorType
cdef object _async_generator = AsyncGeneratorType

# 3.11's task has no get_context(): where its context is, found once on a task of our own.
cdef Py_ssize_t _context_offset = 0
cdef object _native_task_type = None


cdef list _chain(object awaited):
    """(name, file, first line, line) of the coroutines that wait, outermost first."""
    cdef list frames = []
    while len(frames) < _DEPTH:
        kind = type(awaited)
        if kind is _coroutine:
            code, frame, after = awaited.cr_code, awaited.cr_frame, awaited.cr_await
        elif kind is _generator:
            code, frame, after = awaited.gi_code, awaited.gi_frame, awaited.gi_yieldfrom
        elif kind is _async_generator:
            code, frame, after = awaited.ag_code, awaited.ag_frame, awaited.ag_await
        else:
            break  # a future, or an awaitable of somebody's own
        if frame is None:
            break
        frames.append((code.co_qualname, code.co_filename, code.co_firstlineno, frame.f_lineno))
        awaited = after
    return frames


cdef object _context_of(object task):
    cdef PyObject* found
    if _context_offset != 0 and isinstance(task, _native_task_type):
        found = (<PyObject**>(<uintptr_t><void*>task + _context_offset))[0]
        return <object>found if found is not NULL else None
    # The pure Python task keeps it in an attribute; asking that first runs no code of its class.
    context = getattr(task, "_context", None)
    return task.get_context() if context is None else context


cdef bint _waits(object coroutine):
    kind = type(coroutine)
    if kind is _coroutine:
        return coroutine.cr_suspended
    return kind is _generator and coroutine.gi_suspended


def look(task):
    """What one asyncio task shows while it waits.

    Returns:
        (frames, link, task number): the coroutines, innermost first, as (name, file, first line,
        line). None when it runs, has not begun, has ended, or carries no link.
    """
    coroutine = task.get_coro()
    if not _waits(coroutine):
        return None
    context = _context_of(task)
    link = None if context is None else link_in(context)
    if link is None:
        return None
    frames = _chain(coroutine)
    if not frames:
        return None
    frames.reverse()
    return frames, link, task_number(task)


def book(list seen, uint64_t wait_ns):
    """Adds what `look` returned for several tasks to the profile, `wait_ns` nanoseconds each."""
    cdef size_t count = len(seen)
    cdef size_t total = 0
    cdef size_t at = 0
    cdef size_t i
    cdef Py_ssize_t size = 0
    cdef AwaitFrame* frames = NULL
    cdef AwaitSample* samples = NULL
    cdef Link link
    if count == 0:
        return
    for chain, _, _ in seen:
        total += len(chain)
    frames = <AwaitFrame*>malloc(sizeof(AwaitFrame) * (total + 1))
    samples = <AwaitSample*>malloc(sizeof(AwaitSample) * count)
    try:
        if frames is NULL or samples is NULL:
            raise MemoryError
        for i in range(count):
            chain, link, number = seen[i]  # `seen` keeps the strings and the link alive
            samples[i].frames = frames + at
            samples[i].count = <uint32_t>len(chain)
            samples[i].record = link.record
            samples[i].serial = link.number
            samples[i].task = number
            samples[i].wait_ns = wait_ns
            for name, file, first_line, line in chain:
                frames[at].name = PyUnicode_AsUTF8AndSize(name, &size)
                frames[at].name_size = <uint32_t>size
                frames[at].file = PyUnicode_AsUTF8AndSize(file, &size)
                frames[at].file_size = <uint32_t>size
                frames[at].first_line = first_line
                frames[at].line = 0 if line is None else line
                at += 1
        with nogil:
            sampler_add_awaits(samples, count)
    finally:
        free(frames)
        free(samples)


def learn_task_layout(task, context):
    """Finds where a native task keeps its context, for Python 3.11.

    Args:
        task: one that was made for this, with the context beside it and nowhere else.

    Returns:
        Whether tasks can be read now.
    """
    global _context_offset, _native_task_type
    cdef Py_ssize_t offset
    cdef Py_ssize_t found = 0
    kind = type(task)
    for offset in range(2 * sizeof(void*), kind.__basicsize__, sizeof(void*)):
        if (<PyObject**>(<uintptr_t><void*>task + offset))[0] == <PyObject*>context:
            if found != 0:
                return False  # twice: not what we think it is
            found = offset
    _native_task_type = kind
    _context_offset = found
    return found != 0
