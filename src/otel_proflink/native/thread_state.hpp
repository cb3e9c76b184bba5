// SPDX-License-Identifier: Apache-2.0
//
// What the kernel says a thread is doing right now.
#pragma once

#include <cstdint>

#include "profile.hpp"

namespace otel_proflink {

// A thread's CPU clock in nanoseconds; false when the thread is gone. Uses the kernel's computed
// clock ids: `pthread_getcpuclockid` on a dead pthread_t is undefined, this is not.
bool thread_cpu_ns(std::int32_t tid, std::uint64_t* ns) noexcept;

// Reads /proc/self/task/TID/syscall: "running" for a runnable thread, else the system call that it
// sleeps in, whose first argument tells a wait for the GIL from any other futex.
class StateFile {
  public:
    ThreadState read(std::int32_t tid, std::uintptr_t gil_begin, std::uintptr_t gil_end,
                     bool keep_open) noexcept;
    void close() noexcept;
    bool is_open() const noexcept { return fd_ >= 0; }

    // False once the file could not be read: the state is then a guess from the CPU clock.
    static bool available() noexcept;

  private:
    int fd_ = -1;
};

}  // namespace otel_proflink
