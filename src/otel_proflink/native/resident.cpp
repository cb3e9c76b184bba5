// SPDX-License-Identifier: Apache-2.0
#include "resident.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace otel_proflink {

std::uint64_t resident_bytes(const void* mapping, std::size_t size) noexcept {
    constexpr std::size_t kPages = 4096;
    static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    unsigned char present[kPages];
    std::uint64_t pages = 0;
    // mincore() takes no const; it changes nothing.
    auto* at = static_cast<unsigned char*>(const_cast<void*>(mapping));
    for (std::size_t left = (size + page - 1) / page; left != 0;) {
        const std::size_t count = std::min(left, kPages);
        if (mincore(at, count * page, present) != 0) return 0;
        for (std::size_t i = 0; i < count; ++i) pages += present[i] & 1u;
        at += count * page;
        left -= count;
    }
    return pages * page;
}

}  // namespace otel_proflink
