// SPDX-License-Identifier: Apache-2.0
//
// Made-up interpreter layouts, small enough that every word of every read can be a point at which
// the world changes. The order of the fields is CPython's, because the order of reads matters.
#pragma once

#include <cstdint>

#include "abi.h"
#include "context_key.hpp"

namespace otel_proflink::test {

enum class Layout { py311, py312, py313 };

inline const char* name_of(Layout layout) {
    switch (layout) {
        case Layout::py311:
            return "py311";
        case Layout::py312:
            return "py312";
        default:
            return "py313";
    }
}

inline bool has_cframe(Layout layout) { return layout != Layout::py313; }
inline bool has_shims(Layout layout) { return layout != Layout::py311; }

// Numbers that stand for the addresses of types.
inline constexpr std::uintptr_t kCodeType = 0xc0de0000;
inline constexpr std::uintptr_t kContextType = 0xc0de0010;
inline constexpr std::uintptr_t kBitmapType = 0xc0de0020;
inline constexpr std::uintptr_t kArrayType = 0xc0de0030;
inline constexpr std::uintptr_t kCollisionType = 0xc0de0040;
inline constexpr std::uintptr_t kValueType = 0xc0de0050;
inline constexpr std::uintptr_t kInterpreter = 0xc0de1000;
inline constexpr std::uintptr_t kVariable = 0xc0de2000;
inline constexpr std::uintptr_t kOtherVariable = 0xc0de2040;

// Both variables share the first five bits, so that together they need a second level.
inline constexpr std::uint32_t kVariableHash = 1u << 5 | 3u;
inline constexpr std::uint32_t kOtherHash = 2u << 5 | 3u;

namespace tstate_at {
inline constexpr std::uint32_t prev = 0, next = 8, interp = 16, frame = 24, native_thread_id = 32,
                               context = 40, context_ver = 48, id = 56, chunk = 64, top = 72,
                               size = 80, always_zero = 80;
}
namespace frame_at {
inline constexpr std::uint32_t code = 0, previous = 8, instruction = 16, owner = 24, size = 32;
}
namespace chunk_at {
inline constexpr std::uint32_t previous = 0, size = 8, top = 16, data = 24;
}
namespace code_at {
inline constexpr std::uint32_t units = 16, first_line = 24, filename = 32, first_traceable = 40,
                               qualname = 48, linetable = 56, size = 64;
}
namespace context_at {
inline constexpr std::uint32_t vars = 24, hamt_root = 16;
}
namespace node_at {
inline constexpr std::uint32_t bits = 24, pairs = 32, children = 16, collision_size = 16;
}
namespace value_at {
inline constexpr std::uint32_t record = 32, serial = 40;
}
inline constexpr std::uint32_t kTypeAt = 8;

inline ProflinkAbi make_abi(Layout layout) {
    ProflinkAbi abi{};
    abi.supported = 1;
    abi.interpreter = kInterpreter;
    abi.code_type = kCodeType;
    abi.context_type = kContextType;
    abi.bitmap_type = kBitmapType;
    abi.array_type = kArrayType;
    abi.interpreter_state = {0, 8};
    abi.thread.size = tstate_at::size;
    abi.thread.prev = tstate_at::prev;
    abi.thread.next = tstate_at::next;
    abi.thread.interp = tstate_at::interp;
    abi.thread.frame = tstate_at::frame;
    abi.thread.has_cframe = has_cframe(layout) ? 1 : 0;
    abi.thread.cframe_frame = layout == Layout::py311 ? 8 : 0;
    abi.thread.native_thread_id = tstate_at::native_thread_id;
    abi.thread.id = tstate_at::id;
    abi.thread.context = tstate_at::context;
    abi.thread.context_ver = tstate_at::context_ver;
    abi.thread.datastack_chunk = tstate_at::chunk;
    abi.thread.datastack_top = tstate_at::top;
    abi.frame.size = frame_at::size;
    abi.frame.code = frame_at::code;
    abi.frame.previous = frame_at::previous;
    abi.frame.instruction = frame_at::instruction;
    abi.frame.owner = frame_at::owner;
    abi.frame.owner_generator = 1;
    abi.frame.owner_frame_object = 2;
    abi.frame.code_mask = ~std::uintptr_t{0};
    abi.frame.owner_shim = has_shims(layout) ? 3 : PROFLINK_ABI_NO_OWNER;
    abi.frame.owner_last = has_shims(layout) ? 3 : 2;
    abi.frame.chunk_previous = chunk_at::previous;
    abi.frame.chunk_size = chunk_at::size;
    abi.frame.chunk_top = chunk_at::top;
    abi.frame.chunk_data = chunk_at::data;
    abi.code.size = code_at::size;
    abi.code.units = code_at::units;
    abi.code.first_line = code_at::first_line;
    abi.code.filename = code_at::filename;
    abi.code.qualname = code_at::qualname;
    abi.code.linetable = code_at::linetable;
    abi.code.first_traceable = code_at::first_traceable;
    abi.code.first_instruction = layout == Layout::py313 ? 0 : -1;
    // str and bytes as in CPython 3.12.
    abi.object.object_type = kTypeAt;
    abi.object.unicode_length = 16;
    abi.object.unicode_state = 32;
    abi.object.unicode_kind_shift = 2;
    abi.object.unicode_compact_shift = 5;
    abi.object.unicode_ascii_shift = 6;
    abi.object.unicode_ascii_data = 40;
    abi.object.unicode_compact_data = 56;
    abi.object.bytes_size = 16;
    abi.object.bytes_data = 32;
    abi.context.context_vars = context_at::vars;
    abi.context.hamt_root = context_at::hamt_root;
    abi.context.bitmap_bits = node_at::bits;
    abi.context.bitmap_pairs = node_at::pairs;
    abi.context.array_children = node_at::children;
    abi.context.collision_size = node_at::collision_size;
    abi.context.collision_pairs = node_at::pairs;
    return abi;
}

inline ContextKey make_key() {
    return {{kVariable, kVariableHash, kValueType}, value_at::record, value_at::serial};
}

}  // namespace otel_proflink::test
