// SPDX-License-Identifier: Apache-2.0
//
// Code objects by identity, not by address: from frames to a stack of locations in a profile.
#pragma once

#include <atomic>

#include "profile.hpp"
#include "snapshot.hpp"
#include "strings.hpp"

namespace otel_proflink {

// Code objects that the interpreter destroyed (see code_watcher.hpp), told to the sampler before
// their memory is freed. Any thread pushes, one drains, nobody waits.
class DeadCodes {
  public:
    void push(std::uintptr_t code) noexcept;
    // Deaths ever reported: a point in time, for `since`.
    std::uint64_t reported() const noexcept { return head_.load(std::memory_order_acquire); }
    // Whether one of the chain's code objects died since then, as far as can be told: true, if not.
    bool since(std::uint64_t then, const Chain& chain) const noexcept;
    // Moves what was pushed since the last call into `out`; kNoEntry: some were lost, distrust all.
    std::uint32_t drain(std::uintptr_t* out, std::uint32_t capacity) noexcept;

    static constexpr std::uint32_t kCapacity = 4096;

  private:
    // An address fits in 54 bits without its alignment; the rest says which lap of the ring it is
    // of, so that a place that is not written yet, or was overtaken, is never taken for another.
    static constexpr int kLapBits = 10;
    static std::uint64_t pack(std::uintptr_t code, std::uint64_t at) noexcept;

    std::atomic<std::uint64_t> ring_[kCapacity]{};
    std::atomic<std::uint64_t> head_{0};
    std::uint64_t tail_ = 0;
};

PROFLINK_EXPORT DeadCodes& dead_codes() noexcept;
PROFLINK_EXPORT void dead_code_push(std::uintptr_t code) noexcept;

class CodeTable final : public FrameVisitor {
  public:
    CodeTable(Memory& memory, const ProflinkAbi& abi) noexcept : memory_(memory), abi_(abi) {}

    bool reserve() noexcept;

    // Starts afresh for a profile. `deaths` is drained by this table alone; nullptr: whoever
    // calls visit() keeps the chain's code objects alive.
    bool begin(Profile* profile, DeadCodes* deaths) noexcept;

    // Before each attempt: forgets code objects that died until now. Those that die while the
    // attempt runs make visit() fail.
    void prepare() noexcept { drain(nullptr); }

    // Resolves the chain to locations while its frames keep the code objects alive.
    bool visit(const Chain& chain) noexcept override;

    // What visit() learnt is kept once the frames are proven, whatever becomes of the label: the
    // code objects lived then, and no death was reported until all of them had been read.
    void frames_proven() noexcept override { pending_ = 0; }
    // The chain of a record: its frames lived when `then` deaths had been reported. False: what its
    // code objects were can no longer be told.
    bool visit_late(const Chain& chain, std::uint64_t then) noexcept;

    // After an attempt: forgets what was learnt from frames that were not proven.
    void rollback() noexcept;

    // Frames kept of a stack, 1 to kMaxFrames: the deeper half of them from the root.
    void keep(std::uint32_t frames) noexcept { limit_ = frames; }

    // The stack of the last visit, interned into the profile.
    std::uint32_t intern_stack() noexcept;

    float fill() const noexcept { return entries_.fill(); }
    std::uint64_t resident() const noexcept {
        return entries_.resident() + places_.resident() + entry_index_.resident() +
               place_index_.resident();
    }

  private:
    // One interval's code objects and distinct instructions; the exporter swaps before they fill.
    static constexpr std::uint32_t kMaxCodes = 1u << 16;
    static constexpr std::uint32_t kMaxPlaces = 1u << 18;
    static constexpr std::uint32_t kMaxHeader = 256;

    struct Entry {
        std::uintptr_t code;
        std::uintptr_t linetable;
        std::uint32_t function;
        std::uint32_t units;
        std::int32_t first_line;
        std::uint32_t epoch;  // moves when the address gets another meaning
        bool live;
        bool shim;  // the interpreter's own, below an inlined constructor (3.13+): no Python code
    };

    struct Place {
        std::uint32_t entry;
        std::uint32_t epoch;
        std::int32_t unit;
        std::uint32_t location;
    };

    struct Header {
        std::uintptr_t filename, qualname, linetable;
        std::uint64_t units;
        std::int32_t first_line, first_traceable;
    };

    bool drain(const Chain* chain) noexcept;
    void mark_omitted(std::uint32_t count) noexcept;
    void forget(std::uintptr_t code) noexcept;
    bool read_header(std::uintptr_t code, Header* header) noexcept;
    std::uint32_t lookup(std::uintptr_t code) noexcept;
    std::uint32_t learn(std::uintptr_t code) noexcept;
    bool locate(const Frame& frame, std::uint32_t* location) noexcept;
    bool find_unit(const Frame& frame, const Entry& code, std::int32_t* unit) noexcept;
    std::uintptr_t copy_of(const Frame& frame) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    Profile* profile_ = nullptr;
    DeadCodes* deaths_ = nullptr;
    Table<Entry> entries_;
    Table<Place> places_;
    Index entry_index_, place_index_;
    std::uint32_t new_entries_[kMaxFrames];  // learnt from frames that are not proven yet
    std::uint32_t pending_ = 0;
    std::uint32_t limit_ = kMaxFrames;
    std::uint32_t stack_[kMaxFrames + 1];
    std::uint32_t stack_size_ = 0;
    std::uintptr_t drained_[DeadCodes::kCapacity];
    Utf8 name_, file_;
};

}  // namespace otel_proflink
