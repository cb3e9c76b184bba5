// SPDX-License-Identifier: Apache-2.0
//
// The few calls into Python's API that every attach and detach makes, without the exception
// bookkeeping that Cython would put around them. Header-only: part of the linker.
#pragma once

#include <Python.h>

#include "attach_slots.hpp"

namespace otel_proflink {

// `ContextVar.set` between the two counters; a new reference to the token, or nullptr with an
// exception set.
inline PyObject* attach_value(PyObject* variable, PyObject* value) {
    AttachSlot* slot = attach_slot();
    attach_begin(slot);
    PyObject* token = PyContextVar_Set(variable, value);
    attach_done(slot);
    return token;
}

// `ContextVar.reset` between the two counters; false with no exception set when it refuses.
inline bool detach_token(PyObject* variable, PyObject* token) {
    AttachSlot* slot = attach_slot();
    attach_begin(slot);
    const int result = PyContextVar_Reset(variable, token);
    attach_done(slot);
    if (result == 0) return true;
    PyErr_Clear();
    return false;
}

// The attribute, a new reference, or nullptr; an exception other than AttributeError is dropped
// too: what is cached on a span is not worth one in the application.
inline PyObject* optional_attribute(PyObject* object, PyObject* name) {
    PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
    const int found = PyObject_GetOptionalAttr(object, name, &value);
#else
    const int found = _PyObject_LookupAttr(object, name, &value);
#endif
    if (found < 0) PyErr_Clear();
    return value;
}

// The value of a key, None when there is none: a new reference from the start, as no lock keeps the
// dict from changing on free-threaded builds. nullptr with an exception set.
inline PyObject* dict_get(PyObject* dict, PyObject* key) {
    PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
    if (PyDict_GetItemRef(dict, key, &value) < 0) return nullptr;
    return value != nullptr ? value : Py_NewRef(Py_None);
#else
    value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred() != nullptr) return nullptr;
    return Py_NewRef(value != nullptr ? value : Py_None);
#endif
}

}  // namespace otel_proflink
