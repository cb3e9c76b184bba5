// SPDX-License-Identifier: Apache-2.0
//
// The main interpreter's thread states, found by reads alone and kept from tick to tick.
#pragma once

#include "arena.hpp"
#include "cpu_timer.hpp"
#include "snapshot.hpp"
#include "thread_state.hpp"

namespace otel_proflink {

struct SampledThread {
    ThreadKey key;
    StateFile state_file;
    CpuTimer timer;
    std::uint64_t timer_retry_tick = 0;  // not before this; 0: not looked at yet
    std::uint64_t silent_ns = 0;         // CPU burnt since the timer last said so
    bool recorded = false;               // it said so since the last look
    ThreadCache cache;
    std::uint64_t attaches = 0;      // the slot's counter when last looked at
    std::uint64_t cpu_ns = 0;        // its CPU clock then
    std::uint64_t polled_ns = 0;     // monotonic time then: weights start from here
    std::uint64_t counted_tick = 0;  // its samples count every tick up to this one
    std::uint64_t next_tick = 0;     // not looked at before, unless it attaches
    std::uint32_t idle_polls = 0;
    std::uint32_t sample = kNoEntry;  // what its time is credited to while nothing changes
    LinkData link{};                  // that sample's, where it has one
    bool linked = false;
    std::uint32_t profiled = kNoEntry;
    // CPU time by its clock and by its on-CPU samples, of about the last sixteen looks at it.
    double recent_clock_ns = 0;
    double recent_sampled_ns = 0;
    std::uint64_t preemptions = 0;     // when last looked at, with one CPU only
    std::uint64_t cpu_carried_ns = 0;  // burnt in an earlier interval that had no sample for it
    bool fresh = true;                 // to be read even if its clock stands still
};

class ThreadList {
  public:
    ThreadList(Memory& memory, const ProflinkAbi& abi) noexcept : memory_(memory), abi_(abi) {}

    bool reserve() noexcept { return threads_.reserve(kMaxThreads); }

    // Learns of new thread states and slots. `first`: threads found now existed before, so their
    // CPU clocks count from now; later ones count from their birth.
    void refresh(std::uint64_t tick, std::uint64_t now_ns, std::uint64_t period_ns,
                 bool first) noexcept;
    void remove(std::uint32_t index) noexcept;
    // The next refresh walks the whole list: a thread state was not what the list said.
    void distrust() noexcept { distrusted_ = true; }
    // Finds the attach slots of threads that got theirs since the last call.
    void resolve_slots() noexcept;
    void clear() noexcept;
    void ignore(std::int32_t tid, bool ignored) noexcept;
    void ignore_none() noexcept;

    std::uint32_t size() const noexcept { return size_; }
    SampledThread* find(std::uintptr_t tstate, std::uint64_t id) noexcept;
    SampledThread& operator[](std::uint32_t i) noexcept { return threads_[i]; }
    std::uint32_t open_files() const noexcept;
    std::uint64_t resident() const noexcept { return threads_.resident(); }

  private:
    // Threads beyond this are not sampled (counted by the kernel's own limit long before).
    static constexpr std::uint32_t kMaxThreads = 1u << 15;
    static constexpr std::uint32_t kMaxIgnored = 16;
    // A full re-walk finds thread states that ended while their thread lives on (C threads).
    static constexpr std::uint64_t kWalkEvery = 128;

    bool walk(std::uint64_t now_ns, std::uint64_t period_ns, bool first, bool whole) noexcept;
    bool runs_already(std::int32_t tid) const noexcept;
    bool ignored(std::int32_t tid) const noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    Reserved<SampledThread> threads_;
    std::uint32_t size_ = 0;
    std::uintptr_t head_ = 0;
    std::uint64_t next_id_ = 0;
    std::uint64_t assigned_ = 0;
    bool distrusted_ = false;
    std::atomic<std::int32_t> ignored_[kMaxIgnored]{};
};

}  // namespace otel_proflink
