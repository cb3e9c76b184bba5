// SPDX-License-Identifier: Apache-2.0
//
// What our ContextVar holds: the OTel context and the link of its span. Written by hand because
// one is made at every attach. Header-only: it is compiled into the linker, which may use Python's
// API.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

#include "link.hpp"

namespace otel_proflink {

struct ContextValue {
    PyObject_HEAD PyObject* context;
    PyObject* link;      // owns the record; nullptr: no span
    LinkRecord* record;  // read by the sampler, with its serial
    std::uint64_t serial;
};

namespace context_value_detail {

#ifdef Py_GIL_DISABLED
inline constexpr int kFreeListSize = 0;
inline std::atomic<Py_ssize_t> alive{0};
#else
// Values live as long as a span is current: a few per thread are in flight.
inline constexpr int kFreeListSize = 128;
inline Py_ssize_t alive = 0;
#endif
inline PyObject* free_list[kFreeListSize + 1];
inline int free_count = 0;

inline int traverse(PyObject* self, visitproc visit, void* arg) {
    auto* value = reinterpret_cast<ContextValue*>(self);
    Py_VISIT(value->context);
    return 0;  // a link refers to nothing
}

inline int clear(PyObject* self) {
    Py_CLEAR(reinterpret_cast<ContextValue*>(self)->context);
    return 0;
}

inline void dealloc(PyObject* self) {
    auto* value = reinterpret_cast<ContextValue*>(self);
    PyObject_GC_UnTrack(self);
    PyObject* context = value->context;
    PyObject* link = value->link;
    // First of all, and still in the object: a sampler that is late sees that it has no link.
    value->record = nullptr;
    value->serial = 0;
    value->context = value->link = nullptr;
    --alive;
    if (free_count < kFreeListSize) {
        free_list[free_count++] = self;
    } else {
        PyObject_GC_Del(self);
    }
    Py_XDECREF(link);
    Py_XDECREF(context);  // may run any code: nothing of `self` is touched any more
}

inline PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace context_value_detail

inline int context_value_ready() {
    PyTypeObject& type = context_value_detail::type;
    type.tp_name = "otel_proflink._linker.ContextValue";
    type.tp_basicsize = sizeof(ContextValue);
    type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION;
    type.tp_doc = "An attached OpenTelemetry context and its link.";
    type.tp_traverse = context_value_detail::traverse;
    type.tp_clear = context_value_detail::clear;
    type.tp_dealloc = context_value_detail::dealloc;
    return PyType_Ready(&type);
}

// Takes new references to `context` and `link` (Py_None: none). nullptr with MemoryError set.
inline PyObject* context_value_new(PyObject* context, PyObject* link, LinkRecord* record,
                                   std::uint64_t serial) {
    using namespace context_value_detail;
    PyObject* self;
    if (free_count > 0) {
        self = free_list[--free_count];
        PyObject_Init(self, &type);
    } else {
        self = reinterpret_cast<PyObject*>(PyObject_GC_New(ContextValue, &type));
        if (self == nullptr) return nullptr;
    }
    auto* value = reinterpret_cast<ContextValue*>(self);
    Py_INCREF(context);
    value->context = context;
    value->link = nullptr;
    if (link != Py_None) {
        Py_INCREF(link);
        value->link = link;
    }
    value->record = record;
    value->serial = serial;
    ++alive;
    PyObject_GC_Track(self);
    return self;
}

inline bool context_value_check(PyObject* object) {
    return Py_TYPE(object) == &context_value_detail::type;
}

inline Py_ssize_t context_value_alive() { return context_value_detail::alive; }
inline void* context_value_type() { return &context_value_detail::type; }
inline std::uint32_t context_value_record_offset() { return offsetof(ContextValue, record); }
inline std::uint32_t context_value_serial_offset() { return offsetof(ContextValue, serial); }

}  // namespace otel_proflink
