// SPDX-License-Identifier: Apache-2.0
#include "context_key.hpp"

namespace otel_proflink {
namespace {
ContextKey g_key;
}

void context_key_publish(void* variable, std::uint32_t folded_hash, void* value_type,
                         std::uint32_t record_offset, std::uint32_t serial_offset) noexcept {
    g_key = ContextKey{reinterpret_cast<std::uintptr_t>(variable), folded_hash,
                       reinterpret_cast<std::uintptr_t>(value_type), record_offset, serial_offset};
}

const ContextKey& context_key() noexcept { return g_key; }

}  // namespace otel_proflink
