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

struct ThreadName {
    std::int64_t tid;
    const char* text;
    std::uint32_t size;
};

// `endpoints` and `names` are sorted by id. False when memory ran out.
PROFLINK_EXPORT bool encode_pprof(const Profile& profile, const Endpoint* endpoints,
                                  std::size_t endpoint_count, const ThreadName* names,
                                  std::size_t name_count, Buffer* out) noexcept;

}  // namespace otel_proflink
