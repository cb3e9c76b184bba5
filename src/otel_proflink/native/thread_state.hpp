// SPDX-License-Identifier: Apache-2.0
//
// What the kernel says a thread is doing right now.
#pragma once

#include <cstddef>
#include <cstdint>

#include "own_file.hpp"
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
    bool is_open() const noexcept { return file_.is_open(); }

  private:
    OwnFile file_;
};

// Reads /proc/self/task/TID/syscall: "running" for a runnable thread, else the system call that it
// sleeps in, whose first argument tells a wait for the GIL from any other futex. It is the owner's
// alone, and a process that is not dumpable is root's; then TID/stat, which anybody may read, still
// tells a thread that sleeps from one that is runnable.
class StateFile {
  public:
    ThreadState read(std::int32_t tid, std::uintptr_t gil_begin, std::uintptr_t gil_end,
                     bool keep_open) noexcept;
    // Times that the thread was put off its CPU while it could have gone on; false: not known.
    bool preemptions(std::int32_t tid, std::uint64_t* count, bool keep_open) noexcept;
    void close() noexcept;
    bool is_open() const noexcept { return state_.is_open(); }

    // False while `syscall` cannot be read: waits for the GIL are then told as `blocked`, and with
    // no /proc at all every thread as `running`, whose CPU clock has to say the rest.
    static bool available() noexcept;

  private:
    TaskFile state_;
    TaskFile status_;
};

}  // namespace otel_proflink
