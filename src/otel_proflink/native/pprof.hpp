// SPDX-License-Identifier: Apache-2.0
//
// pprof's profile.proto, uncompressed.
#pragma once

#include "profile.hpp"
#include "wire.hpp"

namespace otel_proflink {

struct Endpoint {
    std::uint64_t local_root_span_id;
    const char* text;
    std::uint32_t size;
};

// The text that a number stands for.
struct Name {
    std::uint64_t id;
    const char* text;
    std::uint32_t size;
    std::uint64_t number;  // of a task: what the application knows it by
};

// Sorted by id.
struct Names {
    const Name* items = nullptr;
    std::size_t count = 0;
};

// What only Python knows.
struct Vocabulary {
    Names endpoints;  // by local root span id
    Names threads;    // by native thread id
    Names spans;      // by the number in the link
    Names tasks;      // by the number in the sample
};

// False when memory ran out.
PROFLINK_EXPORT bool encode_pprof(const Profile& profile, const Vocabulary& vocabulary,
                                  Buffer* out) noexcept;

}  // namespace otel_proflink
