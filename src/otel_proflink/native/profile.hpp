// SPDX-License-Identifier: Apache-2.0
//
// All samples of one interval, interned. Filled by the tick, then encoded once it is swapped out:
// never both at a time, so it needs no lock of its own.
#pragma once

#include "arena.hpp"
#include "context.hpp"

namespace otel_proflink {

enum class ThreadState : std::uint8_t { running, gil_wait, blocked };

struct StringRef {
    std::uint32_t offset;
    std::uint32_t size;
};

struct Function {
    std::uint32_t name;  // string
    std::uint32_t file;  // string
    std::int32_t first_line;
};

struct Location {
    std::uint32_t function;
    std::int32_t line;
};

struct Stack {
    std::uint32_t first;  // into the frame table, leaf first
    std::uint32_t count;
};

// A thread as this profile saw it. The key is CPython's never-reused thread state id, because the
// kernel hands thread ids out again.
struct ProfiledThread {
    std::uint64_t id;
    std::int32_t tid;
    std::uint64_t cpu_clock_ns;    // what its CPU clock says it burnt
    std::uint64_t cpu_sampled_ns;  // what its on-CPU samples stand for, before scaling
    bool left_out;                 // sampled before it could be said that it is none of them
};

struct Sample {
    std::uint32_t stack;
    std::uint32_t link;    // kNoEntry: no span; kUnknownLink: not proven
    std::uint32_t thread;  // kNoEntry: a task that waits, on no thread
    ThreadState state;
    std::uint64_t task;  // number of the task that waits, or that handed the work over; 0 = none
    std::uint64_t count;
    std::uint64_t cpu_ns;  // to be scaled by the thread's clock / sampled ratio
    std::uint64_t wall_ns;
    std::uint64_t await_ns;  // apart from the threads' totals
};

inline constexpr std::uint32_t kUnknownLink = 0xfffffffeu;

class Profile {
  public:
    // Null when address space is refused.
    static Profile* create(std::uint64_t period_ns) noexcept;

    // Each returns the entry's number. A full table gives its entry 0, which says so (names in
    // profile.cpp), and counts in `overflows`.
    std::uint32_t string(const char* text, std::uint32_t size) noexcept;
    std::uint32_t function(std::uint32_t name, std::uint32_t file, std::int32_t line) noexcept;
    std::uint32_t location(std::uint32_t function, std::int32_t line) noexcept;
    std::uint32_t stack(const std::uint32_t* locations, std::uint32_t count) noexcept;
    std::uint32_t link(const LinkData& link) noexcept;  // kUnknownLink when full
    std::uint32_t thread(std::uint64_t id, std::int32_t tid) noexcept;
    // kNoEntry when full: the observation is dropped and counted.
    std::uint32_t sample(std::uint32_t stack, std::uint32_t link, std::uint32_t thread,
                         ThreadState state, std::uint64_t task = 0) noexcept;

    // A stack of one frame without file or line, for what is not Python code.
    std::uint32_t marker_stack(const char* name) noexcept;

    float fill() const noexcept;
    PROFLINK_EXPORT std::uint64_t resident() const noexcept;  // bytes of its tables

    std::uint64_t start_unix_ns = 0;
    std::uint64_t duration_ns = 0;
    std::uint64_t period_ns = 0;
    std::uint64_t overflows = 0;
    bool awaits = false;  // tasks that wait are in it, or could be

    Table<char> text;
    Table<StringRef> strings;
    Table<Function> functions;
    Table<Location> locations;
    Table<std::uint32_t> frames;
    Table<Stack> stacks;
    Table<LinkData> links;
    Table<ProfiledThread> threads;
    Table<Sample> samples;

  private:
    bool reserve() noexcept;
    template <typename T, typename Equal>
    std::uint32_t intern(Index& index, Table<T>& table, std::uint64_t hash, const T& item,
                         Equal equal) noexcept;

    Index string_index_, function_index_, location_index_, stack_index_, link_index_, thread_index_,
        sample_index_;
};

PROFLINK_EXPORT void profile_free(Profile* profile) noexcept;

}  // namespace otel_proflink
