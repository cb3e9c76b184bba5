// SPDX-License-Identifier: Apache-2.0
#include "thread_state.hpp"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace otel_proflink {
namespace {
std::atomic<bool> g_available{true};
}  // namespace

bool StateFile::available() noexcept { return g_available.load(std::memory_order_relaxed); }

bool thread_cpu_ns(std::int32_t tid, std::uint64_t* ns) noexcept {
    // CPUCLOCK_SCHED of one thread, as in the kernel's include/linux/posix-timers.h.
    const auto clock = static_cast<clockid_t>((~static_cast<unsigned>(tid) << 3) | 6u);
    timespec time;
    if (clock_gettime(clock, &time) != 0) return false;
    *ns = static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000u +
          static_cast<std::uint64_t>(time.tv_nsec);
    return true;
}

std::size_t TaskFile::read(std::int32_t tid, const char* name, char* text, std::size_t capacity,
                           bool keep_open) noexcept {
    if (!file_.is_ours()) {
        char path[64];
        std::snprintf(path, sizeof(path), "/proc/self/task/%d/%s", tid, name);
        file_.open(path);
    }
    const ssize_t size = file_.is_open() ? pread(file_.fd(), text, capacity - 1, 0) : -1;
    if (size <= 0 || !keep_open) file_.close();
    if (size <= 0) return 0;
    text[size] = '\0';
    return static_cast<std::size_t>(size);
}

void TaskFile::close() noexcept { file_.close(); }

ThreadState StateFile::read(std::int32_t tid, std::uintptr_t gil_begin, std::uintptr_t gil_end,
                            bool keep_open) noexcept {
    char text[512];
    if (state_.read(tid, "syscall", text, sizeof(text), keep_open) == 0) {
        // A thread that is just gone looks the same; then its CPU clock will say so next time.
        if (access("/proc/self/syscall", R_OK) == 0) return ThreadState::running;
        g_available.store(false, std::memory_order_relaxed);
        TaskFile stat;
        if (stat.read(tid, "stat", text, sizeof(text), false) == 0) return ThreadState::running;
        // "TID (name) S ...", and a name may hold anything, but what follows it holds no bracket.
        const char* name_end = std::strrchr(text, ')');
        const bool sleeps = name_end != nullptr && name_end[1] == ' ' && name_end[2] != 'R';
        return sleeps ? ThreadState::blocked : ThreadState::running;
    }
    if (!available()) g_available.store(true, std::memory_order_relaxed);
    if (std::strncmp(text, "running", 7) == 0) return ThreadState::running;
    char* rest = nullptr;
    const long number = std::strtol(text, &rest, 10);
    if (number == SYS_futex && rest != nullptr) {
        const auto address = static_cast<std::uintptr_t>(std::strtoull(rest, nullptr, 16));
        if (address >= gil_begin && address < gil_end) return ThreadState::gil_wait;
    }
    return ThreadState::blocked;
}

bool StateFile::preemptions(std::int32_t tid, std::uint64_t* count, bool keep_open) noexcept {
    // Some 1.5 kB on a machine with few CPUs; what is looked for stands at the end.
    char text[8192];
    constexpr char kLabel[] = "\nnonvoluntary_ctxt_switches:";
    if (status_.read(tid, "status", text, sizeof(text), keep_open) == 0) return false;
    const char* found = std::strstr(text, kLabel);
    if (found == nullptr) return false;
    *count = std::strtoull(found + sizeof(kLabel) - 1, nullptr, 10);
    return true;
}

void StateFile::close() noexcept {
    state_.close();
    status_.close();
}

}  // namespace otel_proflink
