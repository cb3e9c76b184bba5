# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Python's face of the native sampler: start, stop, swap, encode."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pystate cimport PyThreadState, PyThreadState_Get
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from libcpp cimport bool as cbool

import contextvars

cdef extern from "Python.h":
    ctypedef struct PyInterpreterState:
        pass

    uint64_t PyThreadState_GetID(PyThreadState*)
    PyInterpreterState* PyInterpreterState_Main()
    PyThreadState* PyInterpreterState_ThreadHead(PyInterpreterState*)
    PyThreadState* PyThreadState_Next(PyThreadState*)

cdef extern from *:
    """
    #include <cstdint>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline std::uint64_t current_tid() {
        return static_cast<std::uint64_t>(syscall(SYS_gettid));
    }
    static inline std::uint64_t parent_pid() { return static_cast<std::uint64_t>(getppid()); }
    """
    uint64_t current_tid() noexcept
    uint64_t parent_pid() noexcept

cdef extern from "abi.h":
    ctypedef struct ProflinkAbiInterpreter:
        uint32_t threads_next_id

    ctypedef struct ProflinkAbiThread:
        uint32_t context_ver
        uint32_t native_thread_id

    ctypedef struct ProflinkAbiCode:
        uint32_t size
        uint32_t units

    ctypedef struct ProflinkAbi:
        int supported
        const char* reason
        uintptr_t interpreter
        uintptr_t bitmap_type
        uintptr_t array_type
        ProflinkAbiInterpreter interpreter_state
        ProflinkAbiThread thread
        ProflinkAbiCode code

    void proflink_abi_fill(ProflinkAbi*) noexcept
    int proflink_abi_shift(ProflinkAbi*, const char*, int) noexcept

cdef extern from "profile.hpp" namespace "otel_proflink" nogil:
    cdef cppclass LinkData:
        uint8_t local_root_span_id[8]
        uint8_t span_type

    cdef cppclass ProfiledThread:
        int32_t tid

    cdef cppclass Sample:
        pass

    cdef cppclass Table[T]:
        uint32_t size()
        T& operator[](uint32_t)

    cdef cppclass Profile:
        uint64_t start_unix_ns
        uint64_t duration_ns
        uint64_t period_ns
        uint64_t resident()
        Table[LinkData] links
        Table[ProfiledThread] threads
        Table[Sample] samples

    void profile_free(Profile*) noexcept
    const char* span_type_text(uint8_t) noexcept

cdef extern from "wire.hpp" namespace "otel_proflink" nogil:
    cdef cppclass Buffer:
        Buffer()
        const unsigned char* data()
        size_t size()

cdef extern from "pprof.hpp" namespace "otel_proflink" nogil:
    cdef cppclass Name:
        uint64_t id
        const char* text
        uint32_t size
        uint64_t number

    cdef cppclass Names:
        const Name* items
        size_t count

    cdef cppclass Vocabulary:
        Names endpoints
        Names threads
        Names spans
        Names tasks

    cbool encode_pprof(const Profile&, const Vocabulary&, Buffer*) noexcept

cdef extern from "sampler.hpp" namespace "otel_proflink" nogil:
    cdef struct SamplerStats:
        uint64_t ticks
        uint64_t late_ticks
        uint64_t snapshots
        uint64_t retries
        uint64_t give_ups
        uint64_t unknown_labels
        uint64_t read_errors
        uint64_t table_overflows
        uint64_t cpu_not_sampled_ns
        uint64_t threads
        uint64_t sampler_cpu_ns
        uint64_t period_ns
        uint64_t state_guesses
        uint64_t cpu_timer
        uint64_t stood_back
        uint64_t signals
        uint64_t signal_overruns
        uint64_t signals_dropped
        uint64_t signal_ns
        uint64_t timers_refused
        uint64_t silent_threads

    cdef enum class Engine(uint8_t):
        sweep
        cpu_timer

    const char* sampler_start(const ProflinkAbi&, uint64_t, cbool, Engine) noexcept
    void sampler_stop() noexcept
    cbool sampler_running() noexcept
    void sampler_ignore(int32_t, cbool) noexcept
    Profile* sampler_swap() noexcept
    float sampler_fill() noexcept
    SamplerStats sampler_stats() noexcept
    const char* sampler_reader() noexcept
    void sampler_tick() noexcept
    uint64_t sampler_memory() noexcept
    void sampler_budget(double) noexcept
    void sampler_keep_frames(uint32_t) noexcept

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    static const int proflink_free_threaded = 1;
    #else
    static const int proflink_free_threaded = 0;
    #endif
    """
    bint proflink_free_threaded

cdef extern from "self_observation.hpp" namespace "otel_proflink":
    cdef cppclass SelfObservation:
        SelfObservation(const ProflinkAbi&)
        const char* take(uintptr_t, uint64_t) noexcept
        uint32_t depth() noexcept
        const char* name(uint32_t, uint32_t*) noexcept
        const char* file(uint32_t, uint32_t*) noexcept
        int32_t line(uint32_t) noexcept
        uint64_t link_serial() noexcept

    cbool layout_plausible(const ProflinkAbi&) noexcept
    const char* memory_refusal() noexcept
    cbool thread_list_is(const ProflinkAbi&, const uintptr_t*, size_t) noexcept
    cbool thread_list_has(const ProflinkAbi&, uintptr_t) noexcept
    uint64_t observed_word(uintptr_t) noexcept
    uintptr_t current_hamt_root_type(const ProflinkAbi&, uintptr_t) noexcept

cdef extern from "code_watcher.hpp" namespace "otel_proflink":
    void code_watch_begin() noexcept
    void code_watch_end() noexcept


class SamplerError(RuntimeError):
    """The sampler cannot run here; the message says why."""


cdef ProflinkAbi _abi
cdef bint _checked = False

memset(&_abi, 0, sizeof(_abi))


def observe():
    """What the sampler sees of the calling thread.

    Returns:
        (frames, serial): frames leaf first as (qualified name, file, line), and the serial of the
        link that the thread's context carries, 0 for none.

    Raises:
        SamplerError: nothing trustworthy was seen.
    """
    cdef SelfObservation* seen = new SelfObservation(_abi)
    cdef PyThreadState* tstate = PyThreadState_Get()
    cdef const char* text
    cdef const char* reason
    cdef uint32_t size = 0
    cdef uint32_t i
    try:
        reason = seen.take(<uintptr_t>tstate, PyThreadState_GetID(tstate))
        if reason is not NULL:
            raise SamplerError((<bytes>reason).decode())
        frames = []
        for i in range(seen.depth()):
            text = seen.name(i, &size)
            name = PyUnicode_DecodeUTF8(text, size, "replace")
            text = seen.file(i, &size)
            frames.append((name, PyUnicode_DecodeUTF8(text, size, "replace"), seen.line(i)))
        return frames, seen.link_serial()
    finally:
        del seen


def root_node_type(context):
    """Address of the type of a `contextvars.Context`'s root node, 0 if it cannot be read."""
    if type(context) is not contextvars.Context:
        raise TypeError("a contextvars.Context is needed")
    return current_hamt_root_type(_abi, <uintptr_t><void*>context)


def threads_agree():
    """Whether the list of thread states reads as the interpreter gives it."""
    cdef uintptr_t states[256]
    cdef size_t count = 0
    cdef PyThreadState* state
    if proflink_free_threaded:
        # Any other thread's state may be freed under our eyes, so only the reader may look at it.
        return thread_list_has(_abi, <uintptr_t>PyThreadState_Get())
    state = PyInterpreterState_ThreadHead(PyInterpreterState_Main())
    while state is not NULL and count < 256:
        states[count] = <uintptr_t>state
        state = PyThreadState_Next(state)
        count += 1
    return state is not NULL or thread_list_is(_abi, states, count)


def threads_made():
    """The interpreter's count of all thread states that it ever made, as it reads."""
    return observed_word(_abi.interpreter + _abi.interpreter_state.threads_next_id)


def context_version():
    """The calling thread's context version, as it reads."""
    return observed_word(<uintptr_t>PyThreadState_Get() + _abi.thread.context_ver)


def code_header_size():
    """Bytes of a code object before its instructions, as compiled in."""
    return _abi.code.size


def code_units(code):
    """A code object's number of code units, as it reads."""
    return observed_word(<uintptr_t><void*>code + _abi.code.units)


def learn_node_types(bitmap, array):
    """Tells the walker the addresses of the two node types that contexts are made of."""
    _abi.bitmap_type = bitmap
    _abi.array_type = array


def self_test():
    """Checks that the compiled-in layout is the running interpreter's. Takes a few milliseconds.

    Raises:
        SamplerError: it is not, or this interpreter or platform is not supported.
    """
    global _checked
    cdef const char* refusal
    if _checked:
        return
    proflink_abi_fill(&_abi)
    if not _abi.supported:
        raise SamplerError((<bytes>_abi.reason).decode())
    for field, by in _shifts:
        proflink_abi_shift(&_abi, field, by)
    if not layout_plausible(_abi):
        raise SamplerError("self-test failed: no interpreter has this layout; not sampling")
    # Else a check that reads nothing would blame the layout.
    refusal = memory_refusal()
    if refusal is not NULL:
        raise SamplerError((<bytes>refusal).decode())
    _follow_fork()
    from otel_proflink import self_test as checks
    checks.run()
    _checked = True


cdef void _follow_fork() noexcept:
    """After a fork in C that Python is not told of (uWSGI's): this thread's id, as CPython would.

    Its thread state still has the id of the parent's main thread, which is the parent's process id,
    and so no thread's of this process.
    """
    cdef uint64_t* held = <uint64_t*>(<uintptr_t>PyThreadState_Get() +
                                      _abi.thread.native_thread_id)
    if held[0] == parent_pid():
        held[0] = current_tid()


cdef list _shifts = []


def shift_layout(str field, int by):
    """As if the interpreter had one field `by` bytes from where it is; for tests of the self-test.

    Raises:
        ValueError: the layout has no such field.
    """
    global _checked
    cdef ProflinkAbi probe
    memset(&probe, 0, sizeof(probe))
    name = field.encode()
    if not proflink_abi_shift(&probe, name, 0):
        raise ValueError(f"no field {field!r}")
    _shifts.append((name, by))
    _checked = False


def start(rate_hz, cbool awaits=False, str engine="auto"):
    """Starts sampling. Does nothing when the sampler runs already. Not from two threads at once.

    Args:
        rate_hz: ticks a second.
        awaits: whether profiles have the sample type of waiting tasks (`await`).
        engine: `sweep`, `cpu_timer` (`sweep` where that cannot be: see `cpu_timer` in `stats`), or
            `auto`, which is `sweep`.

    Raises:
        SamplerError: the self-test failed, memory cannot be read, or no thread could be made.
    """
    cdef uint64_t period = <uint64_t>(1e9 / rate_hz)
    cdef const char* reason
    self_test()
    if sampler_running():
        return
    _follow_fork()
    code_watch_begin()
    reason = sampler_start(_abi, period, awaits,
                           Engine.cpu_timer if engine == "cpu_timer" else Engine.sweep)
    if reason is not NULL:
        code_watch_end()
        raise SamplerError((<bytes>reason).decode())


def stop():
    """Stops sampling; what was sampled stays until the next `swap`."""
    with nogil:
        sampler_stop()
    code_watch_end()


def running():
    """True while the native thread samples."""
    return sampler_running()


def ignore_thread(native_id):
    """Leaves a thread out of all profiles; at most 16 of them."""
    cdef int32_t tid = native_id
    with nogil:
        sampler_ignore(tid, True)


def unignore_thread(native_id):
    """Undoes `ignore_thread`."""
    cdef int32_t tid = native_id
    with nogil:
        sampler_ignore(tid, False)


def fill():
    """How full the current profile's tables are, 0 to 1."""
    cdef float value
    with nogil:
        value = sampler_fill()
    return value


def stats():
    """The sampler's own counters; see `otel_proflink.stats`. Waits for nobody."""
    return dict(sampler_stats())


def memory_bytes():
    """Bytes that the sampler's tables and the links take up. Some 50 us; waits for nobody."""
    return sampler_memory()


def set_max_frames(int frames):
    """Keeps so many frames of a stack, 1 to 1024, half from either end; from the next start on."""
    sampler_keep_frames(<uint32_t>min(max(frames, 1), 1024))


def set_budget(double share):
    """Lets the sampler use this share of one CPU from its next start on; 0: as much as it needs."""
    sampler_budget(share)


def reader():
    """How memory is read: `process_vm_readv` or `/proc/self/mem`."""
    return (<bytes>sampler_reader()).decode()


def tick():
    """Does now, on the calling thread, what the sampling thread does in a tick; for benchmarks.

    Does nothing unless the sampler runs.
    """
    sampler_tick()


def swap():
    """Takes everything sampled since the last swap, None when there is nothing to take."""
    cdef Profile* profile
    cdef Capture capture
    with nogil:
        profile = sampler_swap()
    if profile is NULL:
        return None
    capture = Capture.__new__(Capture)
    capture.profile = profile
    return capture


cdef class Capture:
    """One swapped profile. Owns its native memory."""

    cdef Profile* profile

    def __init__(self):
        raise TypeError("captures come from swap()")

    cdef Profile* checked(self) except NULL:
        if self.profile is NULL:
            raise ValueError("this capture was not made by swap()")
        return self.profile

    def __dealloc__(self):
        profile_free(self.profile)

    @property
    def start_unix_ns(self):
        """Start of the interval, Unix time in nanoseconds."""
        return self.checked().start_unix_ns

    @property
    def duration_ns(self):
        """Length of the interval in nanoseconds."""
        return self.checked().duration_ns

    @property
    def period_ns(self):
        """Time between two ticks in nanoseconds: as asked for, or the mean under a budget."""
        return self.checked().period_ns

    @property
    def sample_count(self):
        """Distinct (stack, link, thread, state) combinations."""
        return self.checked().samples.size()

    @property
    def memory_bytes(self):
        """Bytes that its tables take up in memory."""
        return self.checked().resident()

    def local_roots(self):
        """Local root span id to span type, of every link that occurs."""
        cdef uint32_t i
        roots = {}
        for i in range(self.checked().links.size()):
            root = int.from_bytes(self.checked().links[i].local_root_span_id[:8], "big")
            roots[root] = (<bytes>span_type_text(self.checked().links[i].span_type)).decode()
        return roots

    def thread_ids(self):
        """Native ids of the threads that occur."""
        cdef uint32_t i
        return [self.checked().threads[i].tid for i in range(self.checked().threads.size())]

    def encode_pprof(self, *, endpoints, thread_names, span_names=None, tasks=None):
        """The profile in pprof's format, uncompressed. Encoded without the GIL.

        Args:
            endpoints: local root span id to endpoint.
            thread_names: native thread id to name.
            span_names: number in a link to the span's name; default: no such label.
            tasks: number of a task to (name, id); default: no such labels.

        Raises:
            MemoryError: out of memory.
        """
        cdef _NameList roots = _NameList(endpoints)
        cdef _NameList threads = _NameList(thread_names)
        cdef _NameList spans = _NameList(span_names or {})
        cdef _NameList task_list = _NameList(tasks or {})
        cdef Vocabulary vocabulary
        cdef Buffer* out = new Buffer()
        cdef cbool done
        cdef Profile* profile = self.checked()
        vocabulary.endpoints = roots.names
        vocabulary.threads = threads.names
        vocabulary.spans = spans.names
        vocabulary.tasks = task_list.names
        try:
            with nogil:
                done = encode_pprof(profile[0], vocabulary, out)
            if not done:
                raise MemoryError("out of memory while encoding a profile")
            return PyBytes_FromStringAndSize(<const char*>out.data(), out.size())
        finally:
            del out


@cython.final
cdef class _NameList:
    """Names as the encoder takes them; keeps their text alive."""

    cdef Names names
    cdef Name* items
    cdef list texts

    def __cinit__(self, mapping):
        cdef Py_ssize_t size = 0
        cdef size_t i = 0
        cdef size_t count
        self.texts = sorted(mapping.items())
        count = len(self.texts)
        self.items = <Name*>malloc(sizeof(Name) * (count + 1))
        if self.items is NULL:
            raise MemoryError
        for number, text in self.texts:
            self.items[i].id = number
            self.items[i].number = 0
            if type(text) is tuple:
                text, self.items[i].number = text
            self.items[i].text = PyUnicode_AsUTF8AndSize(text, &size)
            self.items[i].size = <uint32_t>size
            i += 1
        self.names.items = self.items
        self.names.count = count

    def __dealloc__(self):
        free(self.items)
