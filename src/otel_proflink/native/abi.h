/* SPDX-License-Identifier: Apache-2.0
 *
 * Where CPython keeps what a sampler reads, as plain numbers. Only abi.c sees CPython's internal
 * headers; everything else works from this table, so a test can hand in a wrong or made-up one.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PROFLINK_ABI_NO_OWNER 255

typedef struct {
    uint32_t threads_head;    /* PyInterpreterState: first PyThreadState */
    uint32_t threads_next_id; /* counts every thread state ever made */
} ProflinkAbiInterpreter;

typedef struct {
    uint32_t size; /* bytes from the start that one read must cover */
    uint32_t prev;
    uint32_t next;
    uint32_t interp;
    uint32_t frame;      /* the current frame, or the _PyCFrame that holds it */
    uint32_t has_cframe; /* 1 up to 3.12 */
    uint32_t cframe_frame;
    uint32_t native_thread_id;
    uint32_t id;
    uint32_t context;
    uint32_t context_ver;
    uint32_t datastack_chunk;
    uint32_t datastack_top;
} ProflinkAbiThread;

typedef struct {
    uint32_t size;
    uint32_t code;
    uint32_t previous;
    uint32_t instruction;
    uint32_t owner;
    uint32_t copy;       /* int: which copy of the instructions it runs; see ProflinkAbiCode */
    uintptr_t code_mask; /* what of the code pointer is an address: tagged from 3.14 on */
    uint8_t owner_generator;
    uint8_t owner_frame_object; /* never in a live chain */
    uint8_t owner_shim;         /* first value of entry shims; PROFLINK_ABI_NO_OWNER: none */
    uint8_t owner_last;         /* highest valid value */
    uint32_t chunk_previous;
    uint32_t chunk_size;
    uint32_t chunk_top;
    uint32_t chunk_data;
} ProflinkAbiFrame;

typedef struct {
    uint32_t size;  /* header bytes up to the instructions */
    uint32_t units; /* ob_size: number of 2-byte code units */
    uint32_t first_line;
    uint32_t filename;
    uint32_t qualname;
    uint32_t linetable;
    int32_t first_instruction; /* lowest valid index: -1 where it names the unit before the next */
    uint32_t first_traceable;  /* int: instructions before it are not of the function itself */
    uint32_t copies;           /* pointer to {size, addresses}: each thread may run a copy of the
                                * instructions (3.14 on, free-threaded); 0: there are none */
} ProflinkAbiCode;

typedef struct {
    uint32_t object_type;
    uint32_t unicode_length;
    uint32_t unicode_state;
    uint32_t unicode_kind_shift; /* bits of the 32-bit state word */
    uint32_t unicode_compact_shift;
    uint32_t unicode_ascii_shift;
    uint32_t unicode_ascii_data;
    uint32_t unicode_compact_data;
    uint32_t bytes_size;
    uint32_t bytes_data;
} ProflinkAbiObject;

typedef struct {
    uint32_t context_vars;
    uint32_t hamt_root;
    uint32_t bitmap_bits;
    uint32_t bitmap_pairs;
    uint32_t array_children;
    uint32_t collision_size;
    uint32_t collision_pairs;
} ProflinkAbiContext;

typedef struct {
    int supported;
    const char* reason; /* why not, when not supported */
    uintptr_t interpreter;
    uintptr_t gil_begin; /* the main interpreter's GIL: a futex in here is a wait for it */
    uintptr_t gil_end;
    uintptr_t gil_holder; /* where it says which thread state took it last; 0: free-threaded, */
    uintptr_t gil_locked; /* and whether somebody holds it: an int */
    uintptr_t code_type;
    uintptr_t context_type;
    uintptr_t bitmap_type; /* HAMT node types, learnt by the self-test */
    uintptr_t array_type;
    ProflinkAbiInterpreter interpreter_state;
    ProflinkAbiThread thread;
    ProflinkAbiFrame frame;
    ProflinkAbiCode code;
    ProflinkAbiObject object;
    ProflinkAbiContext context;
} ProflinkAbi;

/* Fills `abi` for the running interpreter. Needs the GIL. */
__attribute__((visibility("default"))) void proflink_abi_fill(ProflinkAbi* abi);

/* Moves one field of a filled table, by its name in it ("thread.context"), as if the interpreter
 * were another release than the one that this was built for. For the tests of the self-test. 0: no
 * such field. */
__attribute__((visibility("default"))) int proflink_abi_shift(ProflinkAbi* abi, const char* field,
                                                              int bytes);

#ifdef __cplusplus
}
#endif
