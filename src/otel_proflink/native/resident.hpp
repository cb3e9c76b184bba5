// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace otel_proflink {

// Bytes of a mapping of ours that take up memory: tables are reserved address space, of which only
// what was touched has pages. 0 where the kernel does not say. One system call for each 16 MiB.
std::uint64_t resident_bytes(const void* mapping, std::size_t size) noexcept;

}  // namespace otel_proflink
