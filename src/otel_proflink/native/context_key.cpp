// SPDX-License-Identifier: Apache-2.0
#include "context_key.hpp"

namespace otel_proflink {
namespace {
ContextKey g_key;
}

void context_key_publish(void* variable, std::uint32_t folded_hash, void* value_type,
                         std::uint32_t record_offset, std::uint32_t serial_offset) noexcept {
    static_cast<VariableKey&>(g_key) = {reinterpret_cast<std::uintptr_t>(variable), folded_hash,
                                        reinterpret_cast<std::uintptr_t>(value_type)};
    g_key.record_offset = record_offset;
    g_key.serial_offset = serial_offset;
}

void context_key_publish_task(void* variable, std::uint32_t folded_hash, void* value_type,
                              std::uint32_t offset) noexcept {
    g_key.task = {reinterpret_cast<std::uintptr_t>(variable), folded_hash,
                  reinterpret_cast<std::uintptr_t>(value_type)};
    g_key.task_offset = offset;
}

void context_key_use_tasks() noexcept {
    // The sampler may read on: it misses the first task by a tick at most.
    __atomic_store_n(&g_key.tasks, true, __ATOMIC_RELEASE);
}

const ContextKey& context_key() noexcept { return g_key; }

}  // namespace otel_proflink
