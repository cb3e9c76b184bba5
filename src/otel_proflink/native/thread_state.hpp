// SPDX-License-Identifier: Apache-2.0
//
// What the kernel says a thread is doing right now.
#pragma once

#include <cstddef>
#include <cstdint>

#include "profile.hpp"

namespace otel_proflink {

// A thread's CPU clock in nanoseconds; false when the thread is gone. Uses the kernel's computed
// clock ids: `pthread_getcpuclockid` on a dead pthread_t is undefined, this is not.
bool thread_cpu_ns(std::int32_t tid, std::uint64_t* ns) noexcept;

// A file of /proc/self/task/TID, kept open between reads of a busy thread if wanted.
class TaskFile {
  public:
    // Bytes read into `text`, which is then terminated; 0: it cannot be read.
    std::size_t read(std::int32_t tid, const char* name, char* text, std::size_t capacity,
                     bool keep_open) noexcept;
    void close() noexcept;
    bool is_open() const noexcept { return fd_ >= 0; }

  private:
    int fd_ = -1;
};

// Reads /proc/self/task/TID/syscall: "running" for a runnable thread, else the system call that it
// sleeps in, whose first argument tells a wait for the GIL from any other futex.
class StateFile {
  public:
    ThreadState read(std::int32_t tid, std::uintptr_t gil_begin, std::uintptr_t gil_end,
                     bool keep_open) noexcept;
    // Times that the thread was put off its CPU while it could have gone on; false: not known.
    bool preemptions(std::int32_t tid, std::uint64_t* count, bool keep_open) noexcept;
    void close() noexcept;
    bool is_open() const noexcept { return state_.is_open(); }

    // False once the file could not be read: the state is then a guess from the CPU clock.
    static bool available() noexcept;

  private:
    TaskFile state_;
    TaskFile status_;
};

}  // namespace otel_proflink
