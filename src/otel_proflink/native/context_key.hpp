// SPDX-License-Identifier: Apache-2.0
//
// What a reader must know to find the link in a `contextvars.Context`: published once by the
// linker, read by the sampler.
#pragma once

#include <cstddef>
#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

// Where a ContextVar of ours is in the HAMT of a context.
struct VariableKey {
    std::uintptr_t variable = 0;    // the ContextVar; immortal for the process
    std::uint32_t folded_hash = 0;  // its hash as CPython's HAMT folds it
    std::uintptr_t value_type = 0;  // type of our values; anything else under the key is not ours
};

struct ContextKey : VariableKey {
    std::uint32_t record_offset = 0;  // in the value: address of the link record, 0 = no span
    std::uint32_t serial_offset = 0;  // in the value: serial of that record
    // The task that handed this work over. Only looked up once a task has.
    VariableKey task{};
    std::uint32_t task_offset = 0;  // in the value: the task's number
    bool tasks = false;
};

// CPython folds a 64-bit hash to the HAMT's 32 bits (Python/hamt.c).
inline std::uint32_t fold_hash(std::ptrdiff_t hash) noexcept {
    const auto wide = static_cast<std::uint64_t>(hash);
    const auto folded =
        static_cast<std::uint32_t>(wide & 0xffffffffu) ^ static_cast<std::uint32_t>(wide >> 32);
    return folded == 0xffffffffu ? 0xfffffffeu : folded;
}

PROFLINK_EXPORT void context_key_publish(void* variable, std::uint32_t folded_hash,
                                         void* value_type, std::uint32_t record_offset,
                                         std::uint32_t serial_offset) noexcept;
PROFLINK_EXPORT void context_key_publish_task(void* variable, std::uint32_t folded_hash,
                                              void* value_type, std::uint32_t offset) noexcept;
// From now on there are values under the task's variable.
PROFLINK_EXPORT void context_key_use_tasks() noexcept;
PROFLINK_EXPORT const ContextKey& context_key() noexcept;

}  // namespace otel_proflink
