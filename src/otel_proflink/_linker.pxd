# SPDX-License-Identifier: Apache-2.0
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libcpp cimport bool as cbool


cdef extern from "link.hpp" namespace "otel_proflink" nogil:
    cdef cppclass LinkSerial "std::atomic<std::uint64_t>":
        uint64_t load()

    cdef cppclass LinkFlagByte "std::atomic<std::uint8_t>":
        uint8_t load()

    cdef cppclass LinkRecord:
        LinkSerial serial
        uint8_t trace_id[16]
        uint8_t span_id[8]
        uint8_t local_root_span_id[8]
        uint8_t trace_flags
        uint8_t span_type
        uint8_t flags
        LinkFlagByte sampled
        uint32_t name

    cdef cppclass LinkTotals:
        uint64_t samples
        uint64_t cpu_ns
        uint64_t wall_ns
        uint64_t gil_wait_ns

    cdef uint8_t kLinkRemote
    LinkRecord* link_new(const uint8_t*, const uint8_t*, const uint8_t*, uint8_t, uint8_t,
                         uint8_t, const LinkRecord*) noexcept
    bint link_totals(const LinkRecord*, LinkTotals*, LinkTotals*) noexcept
    void link_free(LinkRecord*) noexcept
    uint64_t link_live() noexcept
    uint8_t span_type_intern(const char*, uint32_t) noexcept
    const char* span_type_text(uint8_t) noexcept


cdef extern from "attach_slots.hpp" namespace "otel_proflink" nogil:
    cdef cppclass AttachSlot:
        pass

    AttachSlot* attach_slot() noexcept
    void attach_begin(AttachSlot*) noexcept
    void attach_done(AttachSlot*) noexcept


cdef extern from "attach.hpp" namespace "otel_proflink":
    object attach_value(object, object)
    bint detach_token(object, object) noexcept
    PyObject* optional_attribute(object, object) noexcept
    object dict_get(object, object)


cdef extern from "context_key.hpp" namespace "otel_proflink" nogil:
    void context_key_publish(void* variable, uint32_t folded_hash, void* value_type,
                             uint32_t record_offset, uint32_t serial_offset) noexcept
    void context_key_publish_task(void* variable, uint32_t folded_hash, void* value_type,
                                  uint32_t offset) noexcept
    void context_key_use_tasks() noexcept
    uint32_t fold_hash(Py_ssize_t) noexcept


cdef extern from "context_value.hpp" namespace "otel_proflink":
    cdef cppclass ContextValue:
        PyObject* context
        PyObject* link
        LinkRecord* record
        uint64_t serial

    int context_value_ready() except -1
    object context_value_new(object, object, LinkRecord*, uint64_t)
    bint context_value_check(PyObject*) noexcept
    Py_ssize_t context_value_alive() noexcept
    void* context_value_type() noexcept
    uint32_t context_value_record_offset() noexcept
    uint32_t context_value_serial_offset() noexcept


cdef extern from "trace_id.hpp" namespace "otel_proflink":
    cbool trace_id_bytes(object, uint8_t*) except False


cdef class TaskMark:
    cdef uint64_t number
    cdef object task  # a weak reference


cdef class Link:
    cdef LinkRecord* record
    cdef uint64_t number
