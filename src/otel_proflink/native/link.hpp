// SPDX-License-Identifier: Apache-2.0
//
// Links as native code sees them: fixed records in memory that is never unmapped.
#pragma once

#include <atomic>
#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

// W3C Trace Context, trace-flags: the caller may have recorded the trace.
inline constexpr std::uint8_t kTraceFlagSampled = 1;

enum LinkFlag : std::uint8_t {
    // The span lives in another process and nothing said what its local root is here: a local
    // child of it starts a local root of its own.
    kLinkRemote = 1,
};

// One span as a profile sees it. Ids are in W3C byte order. 64 bytes: one cache line, so that a
// sampler's read never touches two.
struct alignas(64) LinkRecord {
    std::atomic<std::uint64_t>
        serial;  // 0: free. Never reused: proves that the record is the one meant.
    std::uint8_t trace_id[16];
    std::uint8_t span_id[8];
    std::uint8_t local_root_span_id[8];
    std::uint8_t trace_flags;
    std::uint8_t span_type;  // index into the span type table, 0 = none
    std::uint8_t flags;      // LinkFlag
    // 1: samples were booked on this record. May come late from its last owner: only a hint that
    // there is something to look up.
    std::atomic<std::uint8_t> sampled;
    std::uint32_t name;         // number of the span's name, 0 = none; whose, only the linker knows
    std::uint32_t root;         // index of the local root's record, kNoRecord: none in this process
    std::uint32_t next_free;    // index of the next free record, while this one is free
    std::uint64_t root_serial;  // of the local root's record
};
static_assert(sizeof(LinkRecord) == 64);

inline constexpr std::uint32_t kNoRecord = 0xffffffffu;

// What the sampler keeps of a link: a plain copy.
struct LinkData {
    std::uint8_t trace_id[16];
    std::uint8_t span_id[8];
    std::uint8_t local_root_span_id[8];
    std::uint8_t trace_flags;
    std::uint8_t span_type;
    std::uint32_t name;
    // Where its totals are kept, and those of its local root.
    std::uint32_t record;
    std::uint32_t root;
    std::uint64_t serial;
    std::uint64_t root_serial;
};

// What was sampled of one span.
struct LinkTotals {
    std::uint64_t samples = 0;
    std::uint64_t cpu_ns = 0;
    std::uint64_t wall_ns = 0;
    std::uint64_t gil_wait_ns = 0;
};

// Takes a record from the slab, fills it and gives it a new serial. Lock-free; any thread. It is
// its own local root, in this process, where `parent` is nullptr and its span is that of its root.
// Returns nullptr when memory or the slab's limit (kMaxLinks) is exhausted.
PROFLINK_EXPORT LinkRecord* link_new(const std::uint8_t trace_id[16], const std::uint8_t span_id[8],
                                     const std::uint8_t local_root_span_id[8],
                                     std::uint8_t trace_flags, std::uint8_t span_type,
                                     std::uint8_t flags,
                                     const LinkRecord* parent = nullptr) noexcept;

// Gives a record back. Its serial becomes 0 first, so that a late reader sees that it is gone.
PROFLINK_EXPORT void link_free(LinkRecord* record) noexcept;

// Copies the record at `address` if it is a slab record that still has `serial`. Safe for any
// address: nothing outside the slab is dereferenced.
PROFLINK_EXPORT bool link_read(std::uintptr_t address, std::uint64_t serial,
                               LinkData* out) noexcept;

// Adds to the totals of a span and of its local root, as far as their records still live. For one
// thread only: the sampler's.
void link_account(const LinkData& link, const LinkTotals& share) noexcept;

// What was booked on a record so far: on its own span, and on all spans of which it is the local
// root, itself included. False: nothing. Any thread, while the record lives; waits for nobody.
PROFLINK_EXPORT bool link_totals(const LinkRecord* record, LinkTotals* own,
                                 LinkTotals* below) noexcept;

// Live records, for statistics.
PROFLINK_EXPORT std::uint64_t link_live() noexcept;

// Bytes in memory of records and their totals. Any thread; waits for nobody.
std::uint64_t link_resident() noexcept;

// Interns a span type (at most 255 of them, 31 bytes each; 0 = none or table full). Lock-free; any
// thread.
PROFLINK_EXPORT std::uint8_t span_type_intern(const char* text, std::uint32_t size) noexcept;

// The text of an interned span type, never nullptr.
PROFLINK_EXPORT const char* span_type_text(std::uint8_t index) noexcept;

}  // namespace otel_proflink
