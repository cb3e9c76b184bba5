// SPDX-License-Identifier: Apache-2.0
//
// The cpu_timer engine: a POSIX timer on each thread's CPU clock interrupts the very thread that
// burns CPU, which then reads its own frames. It cannot move meanwhile, so nothing can tear.
//
// What the handler reads goes, as addresses, into a record that the sampling thread turns into a
// sample. The handler allocates nothing, locks nothing, waits for nobody, and uses no thread-local
// storage but errno, which it restores.
#pragma once

#include <atomic>

#include "snapshot.hpp"

namespace otel_proflink {

struct SignalFrame {
    std::uintptr_t code;
    std::uintptr_t instruction;
    std::int32_t copy;
};

// One thread as it was when its timer expired.
struct SignalRecord {
    std::uintptr_t tstate;
    std::uint64_t id;
    std::uint64_t expiries;  // periods of CPU time that it stands for
    std::uint64_t deaths;    // code objects whose death had been reported before it was read
    SnapshotResult result;
    Label label;
    std::uint32_t count;
    std::uint32_t omitted;
    SignalFrame frames[kMaxFrames];
};

struct CpuTimerStats {
    std::uint64_t refused;   // timers that the kernel did not give (RLIMIT_SIGPENDING)
    std::uint64_t signals;   // handled
    std::uint64_t overruns;  // expiries for which there was no signal of their own
    std::uint64_t dropped;   // expiries for which there was no record left
    std::uint64_t spent_ns;  // within the handler, on the application's threads
};

// One thread's timer. Closed by whoever holds it; the sampling thread's business alone.
class CpuTimer {
  public:
    // `first_ns` of CPU time from now, and then each `period_ns`. False: refused, and counted.
    bool open(const ThreadKey& thread, std::uint64_t period_ns, std::uint64_t first_ns) noexcept;
    void close() noexcept;
    bool is_open() const noexcept { return slot_ != kNone; }
    // Where the thread counts its attaches, once it has such a place.
    void attaches_at(const AttachSlot* slot) noexcept;

  private:
    static constexpr std::uint32_t kNone = 0xffffffffu;
    std::uint32_t slot_ = kNone;
};

// Called by a handler when the sampling thread should look at the records soon. A futex wake at
// most: it runs within a signal handler.
using CpuTimerWake = void (*)() noexcept;

// Takes SIGPROF. nullptr on success, else why not. What had it before is called for signals that
// are not ours. `memory` is copied; `abi` and `key` must live on.
const char* cpu_timers_start(const ProcessMemory& memory, const ProflinkAbi& abi,
                             const ContextKey& key, CpuTimerWake wake) noexcept;

// No handler reads anything from now on. SIGPROF stays ours: a signal may still be on its way, and
// what it does by default is to kill the process.
void cpu_timers_stop() noexcept;

// False when somebody has taken SIGPROF since; then all timers must be closed at once.
bool cpu_timers_own_signal() noexcept;

// Hands each finished record to `use`, in no order, and takes it back.
template <typename Use>
void cpu_timers_drain(Use use) noexcept;

// A hint for handlers: this code object is known. A record with others makes them wake the sampling
// thread, before the code can be gone.
void cpu_timers_know(std::uintptr_t code) noexcept;
void cpu_timers_know_nothing() noexcept;

CpuTimerStats cpu_timers_stats() noexcept;

// In a forked child: there are no timers, and no handler is running.
void cpu_timers_after_fork() noexcept;

namespace cpu_timer_detail {

// Records wait for one tick at most, and a thread fills one in 10 ms at the default rate.
inline constexpr std::uint32_t kRecords = 256;

enum class RecordState : std::uint8_t { free, taken, ready };
extern std::atomic<RecordState> g_states[kRecords];
SignalRecord* record_at(std::uint32_t i) noexcept;

}  // namespace cpu_timer_detail

template <typename Use>
void cpu_timers_drain(Use use) noexcept {
    using namespace cpu_timer_detail;
    for (std::uint32_t i = 0; i < kRecords; ++i) {
        if (g_states[i].load(std::memory_order_acquire) != RecordState::ready) continue;
        use(*record_at(i));
        g_states[i].store(RecordState::free, std::memory_order_release);
    }
}

}  // namespace otel_proflink
