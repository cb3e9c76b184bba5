// SPDX-License-Identifier: Apache-2.0
//
// Tells the sampler of code objects before the interpreter frees them. Header-only: it is compiled
// into the Cython module, which may use Python's API. To begin and to end need the GIL, or one
// thread at a time where there is none: CPython guards its list of watchers no better. Deaths are
// told by any thread.
#pragma once

#include <Python.h>

#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

PROFLINK_EXPORT void dead_code_push(std::uintptr_t code) noexcept;

// Without a code watcher (3.11, or others have taken all eight): the destructor of the type. It
// sees every code object, costs some two nanoseconds, and calls the one that was there.
inline destructor g_next_code_dealloc = nullptr;

inline void on_code_dealloc(PyObject* code) noexcept {
    dead_code_push(reinterpret_cast<std::uintptr_t>(code));
    g_next_code_dealloc(code);
}

inline void code_dealloc_wrap() noexcept {
    // Still in the chain when someone wrapped it after us.
    if (g_next_code_dealloc != nullptr) return;
    g_next_code_dealloc = PyCode_Type.tp_dealloc;
    PyCode_Type.tp_dealloc = on_code_dealloc;
}

inline void code_dealloc_unwrap() noexcept {
    if (PyCode_Type.tp_dealloc != on_code_dealloc) return;
    PyCode_Type.tp_dealloc = g_next_code_dealloc;
    g_next_code_dealloc = nullptr;
}

#if PY_VERSION_HEX >= 0x030C0000
inline int g_code_watcher = -1;

inline int on_code_event(PyCodeEvent event, PyCodeObject* code) noexcept {
    if (event == PY_CODE_EVENT_DESTROY) dead_code_push(reinterpret_cast<std::uintptr_t>(code));
    return 0;
}

inline void code_watch_begin() noexcept {
    if (g_code_watcher >= 0) return;
    g_code_watcher = PyCode_AddWatcher(on_code_event);
    if (g_code_watcher >= 0) return;
    PyErr_Clear();
    code_dealloc_wrap();
}

inline void code_watch_end() noexcept {
    code_dealloc_unwrap();
    if (g_code_watcher < 0) return;
    if (PyCode_ClearWatcher(g_code_watcher) < 0) PyErr_Clear();
    g_code_watcher = -1;
}
#else
inline void code_watch_begin() noexcept { code_dealloc_wrap(); }
inline void code_watch_end() noexcept { code_dealloc_unwrap(); }
#endif

}  // namespace otel_proflink
