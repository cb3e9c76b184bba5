// SPDX-License-Identifier: Apache-2.0
//
// The sampling thread. It never takes the GIL, calls no Python and allocates nothing in a tick.
#pragma once

#include "abi.h"
#include "profile.hpp"

namespace otel_proflink {

// How threads are observed that burn CPU (docs/engines.md).
enum class Engine : std::uint8_t {
    sweep,      // by the sampling thread, while they go on
    cpu_timer,  // by themselves, in a handler of SIGPROF; `sweep` where that cannot be
};

struct SamplerStats {
    std::uint64_t ticks;
    std::uint64_t late_ticks;      // woke more than half a period late
    std::uint64_t snapshots;       // threads read
    std::uint64_t retries;         // attempts that something changed under
    std::uint64_t give_ups;        // threads reported as unreadable after the last attempt
    std::uint64_t unknown_labels;  // samples whose label was not proven, those included
    std::uint64_t read_errors;     // addresses that could not be read
    std::uint64_t table_overflows;
    std::uint64_t cpu_not_sampled_ns;  // burnt by threads that no sample ever caught running
    std::uint64_t threads;
    std::uint64_t sampler_cpu_ns;
    std::uint64_t period_ns;  // between ticks, now: longer than asked for to hold the CPU budget
    std::uint64_t state_guesses;  // 1: the kernel does not tell thread states
    std::uint64_t cpu_timer;      // 1: CPU is sampled by timers
    std::uint64_t stood_back;     // times that somebody else took SIGPROF
    std::uint64_t signals;
    std::uint64_t signal_overruns;  // expiries without a signal of their own: tick granularity
    std::uint64_t signals_dropped;  // no record was free, or the thread was gone
    std::uint64_t signal_ns;        // spent in the handler, on the application's threads
    std::uint64_t timers_refused;   // EAGAIN: RLIMIT_SIGPENDING
    std::uint64_t silent_threads;   // that burnt CPU, but got no signal: they block it
};

// All of these return nullptr on success, else the reason in plain words.

// Checks that the layout in `abi` holds for this interpreter is the caller's business (self-test).
// `awaits`: the profiles have the sample type of waiting tasks.
PROFLINK_EXPORT const char* sampler_start(const ProflinkAbi& abi, std::uint64_t period_ns,
                                          bool awaits, Engine engine = Engine::sweep) noexcept;
PROFLINK_EXPORT void sampler_stop() noexcept;
PROFLINK_EXPORT bool sampler_running() noexcept;
PROFLINK_EXPORT void sampler_ignore(std::int32_t tid, bool ignored) noexcept;

// One look at a task that waits: its chain of coroutines, leaf first, and its label.
struct AwaitFrame {
    const char* name;
    std::uint32_t name_size;
    const char* file;
    std::uint32_t file_size;
    std::int32_t first_line;
    std::int32_t line;
};
struct AwaitSample {
    const AwaitFrame* frames;
    std::uint32_t count;
    const LinkRecord* record;  // nullptr: no span
    std::uint64_t serial;
    std::uint64_t task;
    std::uint64_t wait_ns;
};
// Books them. Waits for a tick to end: not for application threads.
PROFLINK_EXPORT void sampler_add_awaits(const AwaitSample* samples, std::size_t count) noexcept;

// Everything since the last swap; the caller owns it. nullptr: never started, or out of memory.
PROFLINK_EXPORT Profile* sampler_swap() noexcept;
PROFLINK_EXPORT float sampler_fill() noexcept;
// Of the run since the last start, as of its last tick. Any thread; waits for nobody.
PROFLINK_EXPORT SamplerStats sampler_stats() noexcept;
// Bytes that the sampler's tables and the links take up in memory, without profiles swapped out.
// Some 50 us; waits for nobody: while a tick runs it gives the last answer.
PROFLINK_EXPORT std::uint64_t sampler_memory() noexcept;
// Frames kept of each stack, 1 to kMaxFrames, from the next start on.
PROFLINK_EXPORT void sampler_keep_frames(std::uint32_t frames) noexcept;
// What sampling may cost from the next start on: share of one CPU, 0 for no limit.
PROFLINK_EXPORT void sampler_budget(double share) noexcept;
PROFLINK_EXPORT const char* sampler_reader() noexcept;
// One tick on the calling thread, beside those of the sampling thread: to count its instructions.
PROFLINK_EXPORT void sampler_tick() noexcept;

}  // namespace otel_proflink
