// SPDX-License-Identifier: Apache-2.0
//
// Tells the sampler of code objects that the interpreter destroys. Header-only: it is compiled
// into the Cython module, which may use Python's API.
#pragma once

#include <Python.h>

#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

PROFLINK_EXPORT void dead_code_push(std::uintptr_t code) noexcept;

#if PY_VERSION_HEX >= 0x030C0000
inline int on_code_event(PyCodeEvent event, PyCodeObject* code) noexcept {
    if (event == PY_CODE_EVENT_DESTROY) dead_code_push(reinterpret_cast<std::uintptr_t>(code));
    return 0;
}

// The watcher's number, or -1: an interpreter has 8, and others may have taken them.
inline int code_watcher_add() noexcept {
    const int number = PyCode_AddWatcher(on_code_event);
    if (number < 0) PyErr_Clear();
    return number;
}

inline void code_watcher_clear(int number) noexcept {
    if (PyCode_ClearWatcher(number) < 0) PyErr_Clear();
}
#else
inline int code_watcher_add() noexcept { return -1; }
inline void code_watcher_clear(int) noexcept {}
#endif

}  // namespace otel_proflink
