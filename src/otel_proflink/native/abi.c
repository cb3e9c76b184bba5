/* SPDX-License-Identifier: Apache-2.0
 *
 * The one place that sees CPython's internal headers, and the one place with version switches.
 * C, because those headers are C.
 */
#define Py_BUILD_CORE 1
#include <Python.h> /* before any system header: it sets feature macros */

#include "abi.h"

#include <stddef.h>
#include <string.h>

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x03100000 && defined(__linux__) && \
    defined(__LP64__)
#define PROFLINK_SAMPLES_HERE 1
#else
#define PROFLINK_SAMPLES_HERE 0
#endif

/* Free-threaded CPython specialises a thread's instructions in a copy of the thread's own. Up
 * to 3.13 it does not specialise them at all. */
#if defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030E0000
#define PROFLINK_COPIES_INSTRUCTIONS 1
#else
#define PROFLINK_COPIES_INSTRUCTIONS 0
#endif

#if PROFLINK_SAMPLES_HERE
/* _PyGC_FINALIZED is a public macro that the internal headers define again. */
#undef _PyGC_FINALIZED
#include <internal/pycore_code.h>
#include <internal/pycore_context.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_hamt.h>
#include <internal/pycore_interp.h>
#include <internal/pycore_runtime.h>
#if PY_VERSION_HEX >= 0x030E0000
#include <internal/pycore_interpframe_structs.h>
#endif

/* Not in every version's headers; laid out so since CPython 3.7, and checked by the self-test. */
typedef struct {
    PyObject_VAR_HEAD uint32_t bits;
    PyObject* pairs[1];
} BitmapNode;

typedef struct {
    PyObject_HEAD PyObject* children[32];
    Py_ssize_t count;
} ArrayNode;

typedef struct {
    PyObject_VAR_HEAD int32_t hash;
    PyObject* pairs[1];
} CollisionNode;

static uint32_t lowest_bit(const PyASCIIObject* probe) {
    uint32_t word = 0;
    memcpy(&word, &probe->state, sizeof(word));
    uint32_t shift = 0;
    while (shift < 31 && (word >> shift & 1) == 0) ++shift;
    return shift;
}

static void fill_string_bits(ProflinkAbi* abi) {
    PyASCIIObject probe;
    memset(&probe, 0, sizeof(probe));
    probe.state.kind = 1;
    abi->object.unicode_kind_shift = lowest_bit(&probe);
    memset(&probe, 0, sizeof(probe));
    probe.state.compact = 1;
    abi->object.unicode_compact_shift = lowest_bit(&probe);
    memset(&probe, 0, sizeof(probe));
    probe.state.ascii = 1;
    abi->object.unicode_ascii_shift = lowest_bit(&probe);
}

static void fill_objects(ProflinkAbi* abi) {
    fill_string_bits(abi);
    abi->object.object_type = offsetof(PyObject, ob_type);
    abi->object.unicode_length = offsetof(PyASCIIObject, length);
    abi->object.unicode_state = offsetof(PyASCIIObject, state);
    abi->object.unicode_ascii_data = sizeof(PyASCIIObject);
    abi->object.unicode_compact_data = sizeof(PyCompactUnicodeObject);
    abi->object.bytes_size = offsetof(PyVarObject, ob_size);
    abi->object.bytes_data = offsetof(PyBytesObject, ob_sval);

    abi->context.context_vars = offsetof(struct _pycontextobject, ctx_vars);
    abi->context.hamt_root = offsetof(PyHamtObject, h_root);
    abi->context.bitmap_bits = offsetof(BitmapNode, bits);
    abi->context.bitmap_pairs = offsetof(BitmapNode, pairs);
    abi->context.array_children = offsetof(ArrayNode, children);
    abi->context.collision_size = offsetof(PyVarObject, ob_size);
    abi->context.collision_pairs = offsetof(CollisionNode, pairs);

    abi->code.size = offsetof(PyCodeObject, co_code_adaptive);
    abi->code.units = offsetof(PyVarObject, ob_size);
    abi->code.first_line = offsetof(PyCodeObject, co_firstlineno);
    abi->code.filename = offsetof(PyCodeObject, co_filename);
    abi->code.qualname = offsetof(PyCodeObject, co_qualname);
    abi->code.linetable = offsetof(PyCodeObject, co_linetable);
    abi->code.first_traceable = offsetof(PyCodeObject, _co_firsttraceable);
#if PY_VERSION_HEX < 0x030D0000
    abi->code.first_instruction = -1;
#endif
#if PROFLINK_COPIES_INSTRUCTIONS
    abi->code.copies = offsetof(PyCodeObject, co_tlbc);
    _Static_assert(offsetof(_PyCodeArray, size) == 0 && offsetof(_PyCodeArray, entries) == 8,
                   "copies are found as {size, addresses}");
#endif
}

static void fill_frames(ProflinkAbi* abi) {
    abi->frame.size = offsetof(_PyInterpreterFrame, localsplus);
    abi->frame.previous = offsetof(_PyInterpreterFrame, previous);
    abi->frame.owner = offsetof(_PyInterpreterFrame, owner);
    abi->frame.owner_generator = FRAME_OWNED_BY_GENERATOR;
    abi->frame.owner_frame_object = FRAME_OWNED_BY_FRAME_OBJECT;
    _Static_assert(FRAME_OWNED_BY_THREAD == 0, "owner values are checked as a range from 0");
#if PY_VERSION_HEX >= 0x030D0000
    abi->frame.code = offsetof(_PyInterpreterFrame, f_executable);
    abi->frame.instruction = offsetof(_PyInterpreterFrame, instr_ptr);
#else
    abi->frame.code = offsetof(_PyInterpreterFrame, f_code);
    abi->frame.instruction = offsetof(_PyInterpreterFrame, prev_instr);
#endif
#if PROFLINK_COPIES_INSTRUCTIONS
    abi->frame.copy = offsetof(_PyInterpreterFrame, tlbc_index);
    _Static_assert(sizeof(((_PyInterpreterFrame*)0)->tlbc_index) == sizeof(int32_t),
                   "which copy a frame runs is read as an int");
#endif
#if PY_VERSION_HEX >= 0x030E0000
    /* Every _PyStackRef of a live frame is an address with at most three tag bits. */
    abi->frame.code_mask = ~(uintptr_t)7;
#else
    abi->frame.code_mask = ~(uintptr_t)0;
#endif
#if PY_VERSION_HEX >= 0x030F0000
    abi->frame.owner_shim = FRAME_OWNED_BY_INTERPRETER;
    abi->frame.owner_last = FRAME_OWNED_BY_INTERPRETER;
    _Static_assert(FRAME_OWNED_BY_INTERPRETER == 3, "a new owner needs a look at the walker");
#elif PY_VERSION_HEX >= 0x030E0000
    abi->frame.owner_shim = FRAME_OWNED_BY_INTERPRETER;
    abi->frame.owner_last = FRAME_OWNED_BY_CSTACK;
    _Static_assert(FRAME_OWNED_BY_INTERPRETER == 3 && FRAME_OWNED_BY_CSTACK == 4,
                   "a new owner needs a look at the walker");
#elif PY_VERSION_HEX >= 0x030C0000
    abi->frame.owner_shim = FRAME_OWNED_BY_CSTACK;
    abi->frame.owner_last = FRAME_OWNED_BY_CSTACK;
    _Static_assert(FRAME_OWNED_BY_CSTACK == 3, "a new owner needs a look at the walker");
#else
    abi->frame.owner_shim = PROFLINK_ABI_NO_OWNER;
    abi->frame.owner_last = FRAME_OWNED_BY_FRAME_OBJECT;
    _Static_assert(FRAME_OWNED_BY_FRAME_OBJECT == 2, "a new owner needs a look at the walker");
#endif
    abi->frame.chunk_previous = offsetof(_PyStackChunk, previous);
    abi->frame.chunk_size = offsetof(_PyStackChunk, size);
    abi->frame.chunk_top = offsetof(_PyStackChunk, top);
    abi->frame.chunk_data = offsetof(_PyStackChunk, data);
}

static void fill_threads(ProflinkAbi* abi) {
    abi->interpreter_state.threads_head = offsetof(PyInterpreterState, threads.head);
    abi->interpreter_state.threads_next_id = offsetof(PyInterpreterState, threads.next_unique_id);
    abi->thread.prev = offsetof(PyThreadState, prev);
    abi->thread.next = offsetof(PyThreadState, next);
    abi->thread.interp = offsetof(PyThreadState, interp);
#if PY_VERSION_HEX >= 0x030D0000
    abi->thread.frame = offsetof(PyThreadState, current_frame);
#else
    abi->thread.frame = offsetof(PyThreadState, cframe);
    abi->thread.has_cframe = 1;
    abi->thread.cframe_frame = offsetof(_PyCFrame, current_frame);
#endif
    abi->thread.native_thread_id = offsetof(PyThreadState, native_thread_id);
    abi->thread.id = offsetof(PyThreadState, id);
    abi->thread.context = offsetof(PyThreadState, context);
    abi->thread.context_ver = offsetof(PyThreadState, context_ver);
    abi->thread.datastack_chunk = offsetof(PyThreadState, datastack_chunk);
    abi->thread.datastack_top = offsetof(PyThreadState, datastack_top);
    abi->thread.size = offsetof(PyThreadState, datastack_top) + sizeof(void*);
}

#if PY_VERSION_HEX >= 0x030D0000
/* From 3.13 on it describes itself: where that differs from the headers, we were built for another
 * release. */
static const char* check_debug_offsets(const ProflinkAbi* abi) {
    const struct _Py_DebugOffsets* self = &_PyRuntime.debug_offsets;
    if (memcmp(self->cookie, _Py_Debug_Cookie, sizeof(self->cookie)) != 0) {
        return "the interpreter's debug offsets have no valid cookie";
    }
    if (self->version >> 16 != PY_VERSION_HEX >> 16) {
        return "the interpreter's debug offsets are of another version";
    }
#ifdef Py_GIL_DISABLED
    if (self->free_threaded != 1) {
        return "the interpreter is not free-threaded, as this was built for";
    }
#else
    if (self->free_threaded != 0) {
        return "the interpreter is free-threaded, and this was built for one that is not";
    }
#endif
#if PROFLINK_COPIES_INSTRUCTIONS
    if (self->code_object.co_tlbc != abi->code.copies ||
        self->interpreter_frame.tlbc_index != abi->frame.copy) {
        return "the interpreter's debug offsets differ from the headers that this was built with";
    }
#endif
    if (self->interpreter_state.threads_head != abi->interpreter_state.threads_head ||
        self->thread_state.interp != abi->thread.interp ||
        self->thread_state.next != abi->thread.next ||
        self->thread_state.current_frame != abi->thread.frame ||
        self->thread_state.native_thread_id != abi->thread.native_thread_id ||
        self->interpreter_frame.previous != abi->frame.previous ||
        self->interpreter_frame.executable != abi->frame.code ||
        self->interpreter_frame.instr_ptr != abi->frame.instruction ||
        self->interpreter_frame.owner != abi->frame.owner ||
        self->code_object.filename != abi->code.filename ||
        self->code_object.qualname != abi->code.qualname ||
        self->code_object.linetable != abi->code.linetable ||
        self->code_object.firstlineno != abi->code.first_line ||
        self->code_object.co_code_adaptive != abi->code.size) {
        return "the interpreter's debug offsets differ from the headers that this was built with";
    }
    return NULL;
}
#endif

static void fill(ProflinkAbi* abi) {
    PyInterpreterState* main_interpreter = PyInterpreterState_Main();
    abi->interpreter = (uintptr_t)main_interpreter;
    abi->code_type = (uintptr_t)&PyCode_Type;
    abi->context_type = (uintptr_t)&PyContext_Type;
#if PY_VERSION_HEX >= 0x030C0000
    struct _gil_runtime_state* gil = main_interpreter->ceval.gil;
#else
    struct _gil_runtime_state* gil = &_PyRuntime.ceval.gil;
#endif
    abi->gil_begin = (uintptr_t)gil;
    abi->gil_end = (uintptr_t)(gil + 1);
#ifndef Py_GIL_DISABLED
    /* Free-threaded, nobody holds it; but an extension module may have it come back, and then a
     * futex within it is still a wait for it. */
    abi->gil_holder = (uintptr_t)&gil->last_holder;
    abi->gil_locked = (uintptr_t)&gil->locked;
#endif
    fill_objects(abi);
    fill_frames(abi);
    fill_threads(abi);
    abi->supported = 1;
#if PY_VERSION_HEX >= 0x030D0000
    abi->reason = check_debug_offsets(abi);
    abi->supported = abi->reason == NULL;
#endif
}
#endif /* PROFLINK_SAMPLES_HERE */

void proflink_abi_fill(ProflinkAbi* abi) {
    memset(abi, 0, sizeof(*abi));
#if PROFLINK_SAMPLES_HERE
    fill(abi);
#elif PY_VERSION_HEX >= 0x03100000
    abi->reason = "CPython " PY_VERSION " is not supported by the sampler yet (3.11 to 3.15 are)";
#else
    abi->reason = "this platform is not supported by the sampler (64-bit Linux is)";
#endif
}

#define FIELD(name) {#name, offsetof(ProflinkAbi, name)}
static const struct {
    const char* name;
    size_t at;
} kFields[] = {
    FIELD(interpreter_state.threads_head),
    FIELD(interpreter_state.threads_next_id),
    FIELD(thread.interp),
    FIELD(thread.prev),
    FIELD(thread.next),
    FIELD(thread.frame),
    FIELD(thread.native_thread_id),
    FIELD(thread.id),
    FIELD(thread.context),
    FIELD(thread.context_ver),
    FIELD(thread.datastack_chunk),
    FIELD(thread.datastack_top),
    FIELD(frame.code),
    FIELD(frame.previous),
    FIELD(frame.instruction),
    FIELD(frame.owner),
    FIELD(frame.copy),
    FIELD(code.size),
    FIELD(code.units),
    FIELD(code.first_line),
    FIELD(code.filename),
    FIELD(code.qualname),
    FIELD(code.linetable),
    FIELD(code.first_traceable),
    FIELD(code.copies),
    FIELD(context.context_vars),
    FIELD(context.hamt_root),
    FIELD(context.bitmap_pairs),
    FIELD(context.array_children),
};

int proflink_abi_shift(ProflinkAbi* abi, const char* field, int bytes) {
    for (size_t i = 0; i < sizeof(kFields) / sizeof(kFields[0]); ++i) {
        if (strcmp(kFields[i].name, field) != 0) continue;
        uint32_t value = 0;
        memcpy(&value, (char*)abi + kFields[i].at, sizeof(value));
        value += (uint32_t)bytes;
        memcpy((char*)abi + kFields[i].at, &value, sizeof(value));
        return 1;
    }
    return 0;
}
