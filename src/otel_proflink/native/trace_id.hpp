// SPDX-License-Identifier: Apache-2.0
//
// A 128-bit Python int as 16 big-endian bytes, in one call. Header-only: part of the linker.
#pragma once

#include <Python.h>

#include <cstdint>

namespace otel_proflink {

// False with an exception set: not an int, negative, or too large.
inline bool trace_id_bytes(PyObject* number, std::uint8_t out[16]) {
    if (!PyLong_Check(number)) {
        PyErr_SetString(PyExc_TypeError, "a trace id is an int");
        return false;
    }
#if PY_VERSION_HEX >= 0x030D0000
    const Py_ssize_t need =
        PyLong_AsNativeBytes(number, out, 16,
                             Py_ASNATIVEBYTES_BIG_ENDIAN | Py_ASNATIVEBYTES_UNSIGNED_BUFFER |
                                 Py_ASNATIVEBYTES_REJECT_NEGATIVE);
    if (need < 0) return false;
    if (need > 16) {
        PyErr_SetString(PyExc_OverflowError, "a trace id has 128 bits");
        return false;
    }
    return true;
#else
    return _PyLong_AsByteArray(reinterpret_cast<PyLongObject*>(number), out, 16, 0, 0) == 0;
#endif
}

}  // namespace otel_proflink
