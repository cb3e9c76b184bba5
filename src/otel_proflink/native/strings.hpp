// SPDX-License-Identifier: Apache-2.0
//
// CPython's str and bytes objects, and the location table, by reads alone.
#pragma once

#include "abi.h"
#include "memory.hpp"

namespace otel_proflink {

// Names and paths longer than this are cut; PATH_MAX is 4096.
inline constexpr std::uint32_t kMaxCharacters = 4096;

// A str as UTF-8. Lone surrogates (undecodable file names) become U+FFFD.
struct Utf8 {
    char data[kMaxCharacters * 4];
    std::uint32_t size = 0;
};

bool read_string(Memory& memory, const ProflinkAbi& abi, std::uintptr_t object, Utf8* out) noexcept;

// The line of code unit `unit` (-1: before the first one), from a code object's location table
// (CPython's Objects/locations.md). False: unreadable.
bool read_line(Memory& memory, const ProflinkAbi& abi, std::uintptr_t linetable,
               std::int32_t first_line, std::int32_t unit, std::int32_t* line) noexcept;

}  // namespace otel_proflink
