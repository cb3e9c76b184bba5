# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Context to link: what each attach of an OpenTelemetry context publishes.

The value of the one ContextVar that holds the OTel context carries the link beside it, so the
link goes wherever CPython carries `tstate->context`: threads, tasks, greenlets. Nothing here
releases the GIL or takes a lock. On free-threaded builds what threads share is written once (then
two of them may at worst write the same), never replaced, or atomic.

Imported while `opentelemetry.context` is half initialised (entry point `opentelemetry_context`):
nothing at module level may import `opentelemetry.trace` or `opentelemetry.instrumentation`.
"""

cimport cython
from cpython.contextvars cimport PyContextVar_New, PyContextVar_Reset
from cpython.dict cimport PyDict_Check, PyDict_DelItem, PyDict_SetItem
from cpython.object cimport PyObject_Hash
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from cpython.weakref cimport PyWeakref_NewRef
from libc.string cimport memcmp

import logging
from contextvars import Context, ContextVar
from functools import partial
from weakref import WeakSet

from opentelemetry.context.context import _RuntimeContext

cdef extern from "Python.h":
    int PyContextVar_Get(object, PyObject*, PyObject**) except -1
    void Py_DECREF(PyObject*)
    Py_ssize_t Py_REFCNT(PyObject*)
    PyObject* PyImport_GetModuleDict()
    int PY_VERSION_HEX

cdef extern from *:
    """
    #include <atomic>
    #include <unistd.h>
    #ifdef Py_GIL_DISABLED
    static const int proflink_free_threaded = 1;
    #else
    static const int proflink_free_threaded = 0;
    #endif
    static inline std::uint64_t next_number(std::uint64_t* last) {
        return __atomic_add_fetch(last, 1, __ATOMIC_RELAXED);
    }
    static inline bool load_flag(const int* flag) {
        return __atomic_load_n(flag, __ATOMIC_SEQ_CST) != 0;
    }
    static inline void store_flag(int* flag, bool value) {
        __atomic_store_n(flag, value, __ATOMIC_SEQ_CST);
    }
    // For one thread of a process; in a child that was forked meanwhile, for one of its own.
    static inline bool claim(int* owner) {
        int before = __atomic_load_n(owner, __ATOMIC_RELAXED);
        const int self = getpid();
        return before != self && __atomic_compare_exchange_n(owner, &before, self, false,
                                                             __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    static inline void disclaim(int* owner) { __atomic_store_n(owner, 0, __ATOMIC_RELEASE); }
    """
    bint proflink_free_threaded
    uint64_t next_number(uint64_t*) noexcept
    cbool load_flag(const int*) noexcept
    void store_flag(int*, cbool) noexcept
    cbool claim(int*) noexcept
    void disclaim(int*) noexcept

LOCAL_ROOT_KEY = "proflink.local_root_span_id"
SPAN_TYPE_KEY = "proflink.span_type"
# Whether this was built for an interpreter that can do without the GIL.
FREE_THREADED = bool(proflink_free_threaded)

cdef object _logger = logging.getLogger(__name__)
cdef str _LINK_ATTRIBUTE = "_proflink_link"
cdef object _LOCAL_ROOT_KEY = LOCAL_ROOT_KEY
cdef object _SPAN_TYPE_KEY = SPAN_TYPE_KEY

# Keys that the API makes up at import time; resolved when first needed, see the module docstring.
cdef object _span_key = None
cdef object _baggage_key = None
cdef object _span_type_of = None
cdef object _internal = None
cdef uint8_t _internal_type = 0
cdef int _types_resolved = 0
cdef object _context_type = None

cdef object _variable = PyContextVar_New("otel_proflink", NULL)


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Link:
    """The immutable record of one span as a profile sees it.

    Made by `new_link` or by the span processor; equal by value, hashable, picklable.
    """

    def __dealloc__(self):
        if self.record is not NULL:
            link_free(self.record)

    @property
    def trace_id(self):
        """Trace id, an unsigned 128-bit integer as in `SpanContext.trace_id`."""
        return int.from_bytes(self.record.trace_id[:16], "big")

    @property
    def span_id(self):
        """Span id, an unsigned 64-bit integer as in `SpanContext.span_id`."""
        return int.from_bytes(self.record.span_id[:8], "big")

    @property
    def local_root_span_id(self):
        """Span id of the first span of the trace in this process."""
        return int.from_bytes(self.record.local_root_span_id[:8], "big")

    @property
    def trace_flags(self):
        """W3C trace flags, 0 to 255."""
        return self.record.trace_flags

    @property
    def span_type(self):
        """Kind of work of the local root, "" when not known."""
        return (<bytes>span_type_text(self.record.span_type)).decode("utf-8", "replace")

    @property
    def is_remote(self):
        """True for a span of another process of which no local root is known here."""
        return (self.record.flags & kLinkRemote) != 0

    @property
    def serial(self):
        """Number of this record; never used twice in a process."""
        return self.number

    def _key(self):
        return (self.trace_id, self.span_id, self.trace_flags, self.local_root_span_id,
                self.span_type)

    def __eq__(self, other):
        if not isinstance(other, Link):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __reduce__(self):
        return new_link, self._key()

    def __repr__(self):
        return (f"Link(trace_id={self.trace_id:032x}, span_id={self.span_id:016x}, "
                f"local_root_span_id={self.local_root_span_id:016x}, "
                f"span_type={self.span_type!r}, trace_flags={self.trace_flags})")


cdef inline void _put_u64(uint8_t* out, uint64_t number) noexcept:
    cdef int i
    for i in range(8):
        out[i] = <uint8_t>(number >> (56 - 8 * i))


cdef Link _make_link(object trace_id, uint64_t span_id, uint64_t local_root, uint8_t trace_flags,
                     uint8_t span_type, uint8_t flags):
    cdef uint8_t trace[16]
    trace_id_bytes(trace_id, trace)
    return _new_link(trace, span_id, local_root, trace_flags, span_type, flags)


cdef Link _new_link(const uint8_t* trace, uint64_t span_id, uint64_t local_root,
                    uint8_t trace_flags, uint8_t span_type, uint8_t flags):
    cdef uint8_t span[8]
    cdef uint8_t root[8]
    _put_u64(span, span_id)
    _put_u64(root, local_root)
    return _own(link_new(trace, span, root, trace_flags, span_type, flags, NULL))


cdef inline Link _own(LinkRecord* record):
    cdef Link link
    if record is NULL:
        raise MemoryError("no link record left")
    link = Link.__new__(Link)
    link.record = record
    link.number = record.serial.load()
    return link


cdef Link _child_link(Link parent, uint64_t span_id, uint8_t trace_flags):
    """A link in the same trace under the same local root."""
    cdef uint8_t span[8]
    _put_u64(span, span_id)
    return _own(link_new(parent.record.trace_id, span, parent.record.local_root_span_id,
                         trace_flags, parent.record.span_type, 0, parent.record))


cdef uint8_t _intern_type(object text) except? 0:
    cdef Py_ssize_t size
    cdef const char* data
    if not text:
        return 0
    data = PyUnicode_AsUTF8AndSize(text, &size)
    return span_type_intern(data, <uint32_t>size)


def new_link(trace_id, span_id, trace_flags, local_root_span_id, span_type):
    """Makes a link.

    Args:
        trace_id: unsigned 128-bit integer, not 0.
        span_id: unsigned 64-bit integer, not 0.
        trace_flags: W3C trace flags, 0 to 255.
        local_root_span_id: unsigned 64-bit integer.
        span_type: kind of work of the local root, "" when not known (at most 31 bytes count).

    Raises:
        ValueError: an id is 0.
        OverflowError: a number is out of range.
        MemoryError: there are more than 16 million live links.
    """
    if not trace_id or not span_id:
        raise ValueError("a link needs a trace id and a span id that are not 0")
    return _make_link(trace_id, span_id, local_root_span_id, trace_flags,
                      _intern_type(span_type), 0)


def link_of(span):
    """The link cached on a span object, None when it has none yet."""
    return _cached(span)


def set_link(span, Link link not None):
    """Caches a link on a span object; spans that take no attributes are left alone."""
    _cache(span, link)


cdef inline Link _cached(object span):
    cdef PyObject* found = optional_attribute(span, _LINK_ATTRIBUTE)
    cdef Link link = None
    if found is not NULL:
        if type(<object>found) is Link:
            link = <Link>found
        Py_DECREF(found)
    return link


cdef inline object _attribute(object thing, str private, str public):
    """The attribute behind a property, where it is there: a property costs a Python call."""
    cdef PyObject* found = optional_attribute(thing, private)
    if found is NULL:
        return getattr(thing, public)
    value = <object>found
    Py_DECREF(found)
    return value


cdef void _cache(object span, Link link):
    try:
        setattr(span, _LINK_ATTRIBUTE, link)
    except Exception:
        pass  # a span class with __slots__: derived again at its next attach


cdef inline object _module(str name):
    """A loaded module, None where it is not. Not for a module that each attach asks for.

    On CPython 3.13t most finds in `sys.modules` take the dict's lock, so that threads wait for each
    other; and a child that is forked while they do finds it locked for ever.
    """
    return dict_get(<object>PyImport_GetModuleDict(), name)


# Found once, and then for good.
cdef object _context_api = None
cdef object _asyncio_events = None
cdef object _asyncio_tasks = None


cdef inline object _loaded_context_api():
    global _context_api
    if _context_api is None:
        _context_api = _module("opentelemetry.context")
    return _context_api


cdef inline object _loaded_asyncio_events():
    global _asyncio_events
    if _asyncio_events is None:
        _asyncio_events = _module("asyncio.events")
    return _asyncio_events


cdef object _resolve_span_key():
    # Not imported from here: the module may be half imported right now. Before it exists no
    # context can hold a span.
    global _span_key
    module = _module("opentelemetry.trace.propagation")
    _span_key = getattr(module, "_SPAN_KEY", None)
    return _span_key


cdef object _resolve_baggage_key():
    global _baggage_key
    module = _module("opentelemetry.baggage")
    _baggage_key = getattr(module, "_BAGGAGE_KEY", None)
    return _baggage_key


cdef object _baggage_of(object context):
    """The baggage dict of a context, None when there is none."""
    key = _baggage_key if _baggage_key is not None else _resolve_baggage_key()
    if key is None or not PyDict_Check(context):
        return None
    baggage = dict_get(context, key)
    return baggage if PyDict_Check(baggage) else None


cdef object _record_in(object baggage):
    """(local root span id, span type) that a context's baggage carries, or None."""
    cdef Py_UCS4 digit
    cdef uint64_t number = 0
    root = baggage.get(_LOCAL_ROOT_KEY)
    if type(root) is not str or len(<str>root) != 16:
        return None
    for digit in <str>root:  # lowercase hex and nothing else: int() takes more
        if u'0' <= digit <= u'9':
            number = number << 4 | (<uint32_t>digit - 0x30)
        elif u'a' <= digit <= u'f':
            number = number << 4 | (<uint32_t>digit - 0x61 + 10)
        else:
            return None
    if not number:
        return None
    span_type = baggage.get(_SPAN_TYPE_KEY)
    return number, span_type if type(span_type) is str else ""


cdef inline object _span_in(object context):
    if not PyDict_Check(context) or (_span_key is None and _resolve_span_key() is None):
        return None
    return dict_get(context, _span_key)


cdef Link _current_link():
    """The link that is attached now; a borrowed context is left alone."""
    cdef PyObject* found = NULL
    cdef ContextValue* value
    cdef Link link = None
    PyContextVar_Get(_variable, NULL, &found)
    if found is not NULL:
        value = <ContextValue*>found
        if value.link is not NULL:
            link = <Link>value.link
        Py_DECREF(found)
    return link


cdef object _current_context():
    """The context attached through us, None when there is none."""
    cdef PyObject* found = NULL
    PyContextVar_Get(_variable, NULL, &found)
    if found is NULL:
        return None
    context = <object>(<ContextValue*>found).context
    Py_DECREF(found)
    return context


cdef struct Ids:
    uint8_t trace_id[16]
    uint64_t span_id
    uint8_t trace_flags
    bint is_remote
    bint valid


cdef int _read_ids(object span_context, Ids* ids) except -1:
    """The ids of a `SpanContext`, which the API defines as a tuple: no Python code is run."""
    cdef object trace_id, span_id
    if isinstance(span_context, tuple) and len(<tuple>span_context) >= 6:
        trace_id = (<tuple>span_context)[0]
        span_id = (<tuple>span_context)[1]
        ids.is_remote = (<tuple>span_context)[2]
        ids.trace_flags = <uint8_t>(<long>(<tuple>span_context)[3] & 0xFF)
        ids.valid = (<tuple>span_context)[5]
    else:
        trace_id = span_context.trace_id
        span_id = span_context.span_id
        ids.is_remote = span_context.is_remote
        ids.trace_flags = <uint8_t>(<long>int(span_context.trace_flags) & 0xFF)
        ids.valid = span_context.is_valid
    if ids.valid:
        trace_id_bytes(trace_id, ids.trace_id)
        ids.span_id = span_id
    return 0


cdef object _span_context_of(object span):
    cdef PyObject* found = optional_attribute(span, "_context")
    if found is NULL:
        return span.get_span_context()
    span_context = <object>found
    Py_DECREF(found)
    return span_context


cdef Link _derive(object span, object context):
    """The link of a span that no processor of ours has seen: sampled out, remote, foreign."""
    cdef Ids ids
    cdef Link link, current
    if not hasattr(span, "get_span_context"):
        return None
    span_context = span.get_span_context()
    if span_context is None:
        return None
    _read_ids(span_context, &ids)
    if not ids.valid:
        return None
    baggage = _baggage_of(context)
    record = _record_in(baggage) if baggage else None
    link = None
    if record is not None:
        link = _new_link(ids.trace_id, ids.span_id, record[0], ids.trace_flags,
                         _intern_type(record[1]), 0)
    elif not ids.is_remote:
        current = _current_link()
        if current is not None and _inheritable(current, &ids):
            link = _child_link(current, ids.span_id, ids.trace_flags)
    if link is None:
        link = _new_link(ids.trace_id, ids.span_id, ids.span_id, ids.trace_flags, 0,
                         kLinkRemote if ids.is_remote else 0)
    _cache(span, link)
    return link


cdef inline bint _inheritable(Link parent, Ids* ids) noexcept:
    return (not (parent.record.flags & kLinkRemote)
            and memcmp(parent.record.trace_id, ids.trace_id, 16) == 0)


cdef Link _derive_safely(object span, object context):
    try:
        return _derive(span, context)
    except Exception:
        _logger.debug("a context is attached without a link", exc_info=True)
        return None


cdef inline Link _link_for(object context):
    cdef Link link
    span = _span_in(context)
    if span is None:
        return None
    link = _cached(span)
    return link if link is not None else _derive(span, context)


def link_for_context(context):
    """The link that attaching `context` publishes, None when it holds no valid span."""
    return _link_for(context)


def current_link():
    """The link that the native side holds for the calling thread, None when there is none.

    Read back from the native record, so it says what a profiler sees now.
    """
    cdef Link link = _current_link()
    if link is None or link.record.serial.load() != link.number:
        return None
    return link


@cython.final
cdef class _Numbered:
    """Texts that samples show by number.

    A generation at a time, so that names made up by the request cannot fill memory; the generation
    before stays readable, for spans that are still running and for profiles that are not encoded
    yet. The dicts are never replaced, so that threads can look into them without a lock.
    """

    cdef dict known  # what was numbered -> its number, or what holds that
    cdef dict texts  # number -> what profiles show
    cdef Py_ssize_t limit
    cdef uint64_t last  # number ever given
    cdef uint64_t older  # the last one of the generation before
    cdef int turning

    def __cinit__(self, Py_ssize_t limit):
        self.known = {}
        self.texts = {}
        self.limit = limit

    cdef uint64_t add(self, object text) except 0:
        cdef uint64_t number
        if len(self.known) >= self.limit:
            self.turn()
        number = next_number(&self.last)
        self.texts[number] = text
        return number

    cdef object turn(self):
        """Begins a generation, and forgets the one before the last."""
        cdef uint64_t forgotten
        if not claim(&self.turning):
            return None
        if len(self.known) >= self.limit:  # still: another thread may just have done it
            forgotten = self.older
            self.older = self.last
            self.known.clear()
            for number in list(self.texts):
                if number <= forgotten:
                    self.texts.pop(number, None)
        disclaim(&self.turning)
        return None


cdef _Numbered _names = _Numbered(8192)


cdef uint32_t _intern_name(object name) except? 0:
    if type(name) is not str:
        return 0
    number = dict_get(_names.known, name)
    if number is None:
        number = _names.add(name)
        _names.known[name] = number
    return <uint32_t><uint64_t>number


def span_names():
    """Numbers in link records to the names of their spans, as they were at span start."""
    return _names.texts.copy()


# Event loops in which spans were started. Up to 3.13 nobody needs them: asyncio has one set of all
# tasks. From 3.14 on, it only tells the tasks of a loop. Free-threaded, nobody looks at tasks.
cdef bint _NOTES_LOOPS = PY_VERSION_HEX >= 0x030E0000 and not proflink_free_threaded
cdef object _loops = WeakSet() if _NOTES_LOOPS else None
cdef object _last_loop = None


cdef object _note_loop():
    global _last_loop
    events = _loaded_asyncio_events()
    if events is None:
        return None
    loop = events._get_running_loop()
    if loop is None or (_last_loop is not None and _last_loop() is loop):
        return None
    _loops.add(loop)
    _last_loop = PyWeakref_NewRef(loop, None)
    return None


def loops():
    """The event loops in which spans were started, from Python 3.14 on with the GIL."""
    return [] if _loops is None else list(_loops)


cdef Link _start_link(object span, object parent_context):
    """The link of a span that starts, with its name."""
    cdef Link link = _inherit_link(span, parent_context)
    if _loops is not None:
        _note_loop()
    link.record.name = _intern_name(_attribute(span, "_name", "name"))
    _cache(span, link)
    return link


cdef Link _inherit_link(object span, object parent_context):
    """The link of a span that starts: local root and type inherited, or its own."""
    cdef Ids ids
    cdef Link parent_link
    _read_ids(_span_context_of(span), &ids)
    if _attribute(span, "_parent", "parent") is not None:
        if parent_context is None:
            parent_link = _current_link()
            if parent_link is None:
                # Attached before the hook was there, or while it was a pass-through.
                parent_link = _link_for(_active_context())
        else:
            parent_link = _link_for(parent_context)
        if parent_link is not None and _inheritable(parent_link, &ids):
            return _child_link(parent_link, ids.span_id, ids.trace_flags)
    # No parent, or a remote one, or one that nothing is known of: a local root.
    return _new_link(ids.trace_id, ids.span_id, ids.span_id, ids.trace_flags,
                     _type_of(span), 0)


cdef object _active_context():
    context = _current_context()
    if context is None:
        context = _loaded_context_api().get_current()
    return context


cdef uint8_t _type_of(object span) except? 0:
    """The interned span type of a local root."""
    global _span_type_of, _internal, _internal_type
    if not load_flag(&_types_resolved):
        from opentelemetry.trace import SpanKind

        from otel_proflink.span_type import span_type_of
        _internal = SpanKind.INTERNAL
        _internal_type = _intern_type(span_type_of(_internal, None))
        _span_type_of = span_type_of
        store_flag(&_types_resolved, True)
    kind = _attribute(span, "_kind", "kind")
    attributes = _attribute(span, "_attributes", "attributes")
    if kind is _internal and not _attribute(attributes, "_dict", "__len__"):
        return _internal_type
    return _intern_type(_span_type_of(kind, attributes))


cdef bint _enriching = True


def enrich_spans(bint enabled):
    """Whether ended spans get what was sampled of them as attributes."""
    global _enriching
    _enriching = enabled


cdef object _enrich(object span, Link link):
    cdef LinkTotals own, below
    cdef dict values = {}
    if not link_totals(link.record, &own, &below):
        return None
    if own.samples != 0:
        values["proflink.samples"] = own.samples
        values["proflink.cpu_ns"] = own.cpu_ns
        values["proflink.wall_ns"] = own.wall_ns
        values["proflink.gil_wait_ns"] = own.gil_wait_ns
    if below.samples != 0:
        values["proflink.total.samples"] = below.samples
        values["proflink.total.cpu_ns"] = below.cpu_ns
        values["proflink.total.wall_ns"] = below.wall_ns
        values["proflink.total.gil_wait_ns"] = below.gil_wait_ns
    if span.is_recording():
        span.set_attributes(values)
        return None
    # The specification lets OnEnding change the span; the SDK (1.45) has it immutable by then.
    attributes = span._attributes
    entries = attributes._dict
    limit = attributes.maxlen
    # Never at the price of one of the application's own attributes.
    if limit is None or len(entries) + len(values) <= limit:
        entries.update(values)
    return None


cdef class SpanHooks:
    """The native half of the span processor: links at start, totals at end. Never raises."""

    def on_start(self, span, parent_context=None):
        """Links `span`; see `opentelemetry.sdk.trace.SpanProcessor.on_start`."""
        try:
            _start_link(span, parent_context)
        except Exception:
            _logger.debug("span not linked", exc_info=True)

    def _on_ending(self, span):
        """Give `span` what was sampled of it, before it becomes read-only."""
        cdef Link link
        try:
            link = _cached(span)
            if link is not None and link.record.sampled.load() != 0 and _enriching:
                _enrich(span, link)
        except Exception:
            _logger.debug("span not enriched", exc_info=True)


cdef class RuntimeContext:
    """OpenTelemetry runtime context whose values carry the link beside the context.

    Chosen by `OTEL_PYTHON_CONTEXT=proflink`, or put over the active runtime context by
    `otel_proflink.runtime_context.install`.

    Args:
        delegate: the runtime context that made the tokens and contexts which are not ours;
            None makes a stock `ContextVarsRuntimeContext`.
    """

    cdef readonly object delegate
    cdef int links
    cdef int left
    cdef int leaving
    # The delegate's own variable, where it is a stock one: read without running its Python code.
    cdef object stock_variable

    def __init__(self, delegate=None):
        from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
        if delegate is None:
            delegate = ContextVarsRuntimeContext()
        self.delegate = delegate
        variable = getattr(delegate, "_current_context", None)
        if type(delegate) is ContextVarsRuntimeContext and isinstance(variable, ContextVar):
            self.stock_variable = variable
        self.links = True
        self.left = False

    @property
    def linking(self):
        """False for a pass-through that publishes no links any more."""
        return load_flag(&self.links)

    @linking.setter
    def linking(self, bint value):
        store_flag(&self.links, value)

    @property
    def alive(self):
        """Values of ours still held by some context or token of this process."""
        return context_value_alive()

    def attach(self, context):
        """Makes `context` current; returns the token that undoes it."""
        cdef Link link = None
        if load_flag(&self.links):
            span = _span_in(context)
            if span is not None:
                link = _cached(span)
                if link is None:
                    link = _derive_safely(span, context)
        elif self._leave():
            return self.delegate.attach(context)
        if link is None:
            value = context_value_new(context, None, NULL, 0)
        else:
            value = context_value_new(context, link, link.record, link.number)
        # Another thread took us out of the API before it could see that this value is alive; not
        # so where an outer attach is ours.
        if load_flag(&self.left) and _current_context() is None:
            return self.delegate.attach(context)
        return attach_value(_variable, value)

    def get_current(self):
        """The current `Context`, never None."""
        cdef PyObject* found = NULL
        context = _current_context()
        if context is not None:
            return context
        if self.stock_variable is not None:
            PyContextVar_Get(self.stock_variable, NULL, &found)
            if found is not NULL:
                context = <object>found
                Py_DECREF(found)
                return context
        return self.delegate.get_current()

    def detach(self, token):
        """Undoes the attach that returned `token`.

        Raises:
            ValueError: the token was made in another `contextvars.Context`.
            RuntimeError: the token was used before.
        """
        if not detach_token(_variable, token):
            # Rare: a token of the delegate's, or one of ours from another contextvars.Context.
            if getattr(token, "var", None) is _variable:
                PyContextVar_Reset(_variable, token)  # refuses again, with its exception
            else:
                self.delegate.detach(token)
        if not load_flag(&self.links):
            self._leave()

    def __repr__(self):
        return f"<otel_proflink.RuntimeContext linking={self.linking} over {self.delegate!r}>"

    cdef bint _leave(self):
        """Takes a pass-through out of the API once no value of ours is alive."""
        if load_flag(&self.left):
            return context_value_alive() == 0
        if context_value_alive() != 0:
            return False
        module = _module("opentelemetry.context")
        if module is None:
            return False
        # By one thread: a late one would take out what install() has put in since.
        if not claim(&self.leaving):
            return False
        try:
            return self._swap_out(module)
        finally:
            disclaim(&self.leaving)

    cdef bint _swap_out(self, object module):
        if getattr(module, "_RUNTIME_CONTEXT", None) is self:
            # Said before it is checked once more: a thread that attaches sees this, or is seen.
            store_flag(&self.left, True)
            if context_value_alive() != 0:
                store_flag(&self.left, False)
                return False
            module._RUNTIME_CONTEXT = self.delegate
            if load_flag(&self.links):  # installed again meanwhile
                module._RUNTIME_CONTEXT = self
                store_flag(&self.left, False)
                return False
        return True

    def try_leave(self):
        """True when this pass-through is (now) out of the API's way."""
        return not load_flag(&self.links) and self._leave()


_RuntimeContext.register(RuntimeContext)


# Tasks that handed work over, or were seen to wait: a number for samples, a name for profiles.
cdef _Numbered _tasks = _Numbered(4096)  # known by id(task), by its mark
cdef object _task_variable = PyContextVar_New("otel_proflink_task", NULL)


@cython.final
cdef class TaskMark:
    """What a context carries of the asyncio task that the work in it came from."""


cdef TaskMark _mark_of(object task):
    cdef TaskMark mark = dict_get(_tasks.known, id(task))
    if mark is not None and mark.task() is task:
        return mark
    mark = TaskMark.__new__(TaskMark)
    mark.task = PyWeakref_NewRef(task, None)
    mark.number = _tasks.add((task.get_name(), id(task)))
    _tasks.known[id(task)] = mark
    context_key_use_tasks()
    return mark


def task_number(task):
    """The number that samples of an asyncio task, or of work that came from it, carry."""
    return _mark_of(task).number


def tasks():
    """Numbers in samples to (name, id) of their tasks."""
    return _tasks.texts.copy()


cdef TaskMark _current_task_mark():
    """The mark of the asyncio task that runs in this thread, None when there is none."""
    global _asyncio_tasks
    events = _loaded_asyncio_events()
    if events is None:
        return None
    try:
        loop = events._get_running_loop()
        if loop is None:
            return None
        if _asyncio_tasks is None:
            _asyncio_tasks = _module("asyncio.tasks")
        task = _asyncio_tasks.current_task(loop)
        return None if task is None else _mark_of(task)
    except Exception:
        _logger.debug("work goes on without its task's name", exc_info=True)
        return None


@cython.final
cdef class _TaskCall:
    """A function that runs, in whatever context, as work of a task."""

    cdef object function
    cdef TaskMark task

    def __call__(self, *args, **kwargs):
        token = attach_value(_task_variable, self.task)
        try:
            return self.function(*args, **kwargs)
        finally:
            detach_token(_task_variable, token)


cdef object _inside_its_context(object function, TaskMark mark):
    """`partial(context.run, f, ...)`, as `asyncio.to_thread` submits it, with `f` marked too.

    What is set around `context.run` is not seen within it.
    """
    cdef _TaskCall call
    run = function.func
    if not function.args or type(getattr(run, "__self__", None)) is not Context:
        return function
    call = _TaskCall.__new__(_TaskCall)
    call.function = function.args[0]
    call.task = mark
    return partial(run, call, *function.args[1:], **function.keywords)


cdef class PropagatedCall:
    """A submitted function with the context that it is to run under.

    Args:
        function: what was submitted.
        context: a copied context; its baggage may carry the propagation record.
    """

    cdef object function
    cdef readonly object context
    cdef TaskMark task

    def __init__(self, function, context):
        self.function = function
        self.context = context

    def __call__(self, *args, **kwargs):
        token = None
        module = None
        task_token = None
        try:
            if self.task is not None:
                task_token = attach_value(_task_variable, self.task)
            module = _loaded_context_api()
            token = module.attach(_unpack(self))
        except Exception:
            _logger.debug("submitted context not attached", exc_info=True)
        try:
            return self.function(*args, **kwargs)
        finally:
            if token is not None:
                module.detach(token)
            if task_token is not None:
                detach_token(_task_variable, task_token)


def propagated(function):
    """A `PropagatedCall` of `function` under a copy of the current context with its record.

    What `PropagatedCall(function, inject(get_current()))` makes, without running Python code.
    """
    cdef PropagatedCall call
    cdef Link link = _current_link()
    context = _active_context()
    if link is None:
        link = _link_for(context)
    baggage = _baggage_of(context)
    context = _copy_context(context)
    if link is not None or baggage:
        _put_record(context, baggage, link)
    call = PropagatedCall.__new__(PropagatedCall)
    call.function = function
    call.context = context
    call.task = _current_task_mark()
    if call.task is not None and type(function) is partial:
        call.function = _inside_its_context(function, call.task)
    return call


cdef object _copy_context(object context):
    global _context_type
    if _context_type is None:
        from opentelemetry.context.context import Context
        _context_type = Context
    return _context_type(context)


cdef object _put_record(object context, object baggage, Link link):
    """Writes the record of `link` into a context that is nobody else's yet."""
    cdef dict entries = {}
    if baggage:
        entries.update(baggage)
        entries.pop(_LOCAL_ROOT_KEY, None)
        entries.pop(_SPAN_TYPE_KEY, None)
    if link is not None:
        entries[_LOCAL_ROOT_KEY] = link.record.local_root_span_id[:8].hex()
        if link.record.span_type != 0:
            entries[_SPAN_TYPE_KEY] = link.span_type
    if _baggage_key is None and _resolve_baggage_key() is None:
        __import__("opentelemetry.baggage")
        _resolve_baggage_key()
    # Past the methods by which a Context refuses changes.
    PyDict_SetItem(context, _baggage_key, entries)


cdef object _unpack(PropagatedCall call):
    """Turns the propagation record of the call's context into a link, and takes it out."""
    context = call.context
    baggage = _baggage_of(context)
    if not baggage or (_LOCAL_ROOT_KEY not in baggage and _SPAN_TYPE_KEY not in baggage):
        return context
    span = _span_in(context)
    if span is not None and _cached(span) is None:
        _derive(span, context)
    if Py_REFCNT(<PyObject*>context) > 2:  # the call's and ours: else somebody else sees it too
        context = _copy_context(context)
    rest = {name: value for name, value in baggage.items()
            if name != _LOCAL_ROOT_KEY and name != _SPAN_TYPE_KEY}
    # Past the methods by which a Context refuses changes: this copy is nobody's yet.
    if rest:
        PyDict_SetItem(context, _baggage_key, rest)
    else:
        PyDict_DelItem(context, _baggage_key)
    call.context = context
    return context


def call_linked(Link link not None, function):
    """Calls `function()` with `link` published, in the current context; for the self-test."""
    token = attach_value(_variable, context_value_new({}, link, link.record, link.number))
    try:
        return function()
    finally:
        detach_token(_variable, token)


def link_in(context):
    """The link that a `contextvars.Context` carries, None when there is none."""
    cdef Link link = None
    cdef PyObject* found
    value = context.get(_variable)
    if value is not None and context_value_check(<PyObject*>value):
        found = (<ContextValue*><PyObject*>value).link
        if found is not NULL:
            link = <Link>found
    return link


def live_links():
    """Links alive in this process."""
    return link_live()


# Known ones first, so that an application that makes up types by the hundred loses only its own.
for _known in ("web", "worker", "rpc", "db", "messaging", "client", "internal"):
    _intern_type(_known)

context_value_ready()
context_key_publish(<void*>_variable, fold_hash(PyObject_Hash(_variable)), context_value_type(),
                    context_value_record_offset(), context_value_serial_offset())

cdef TaskMark _any_mark = TaskMark.__new__(TaskMark)
cdef uint64_t* _number_at = &_any_mark.number
cdef object _mark_type = TaskMark
context_key_publish_task(<void*>_task_variable, fold_hash(PyObject_Hash(_task_variable)),
                         <void*>_mark_type,
                         <uint32_t>(<uintptr_t>_number_at - <uintptr_t><void*>_any_mark))
