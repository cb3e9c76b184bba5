// SPDX-License-Identifier: Apache-2.0
#include "cpu_timer.hpp"

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "arena.hpp"
#include "code.hpp"

namespace otel_proflink {
namespace cpu_timer_detail {
std::atomic<RecordState> g_states[kRecords];
}

namespace {

using cpu_timer_detail::g_states;
using cpu_timer_detail::kRecords;
using cpu_timer_detail::RecordState;

constexpr std::uint64_t kSecond = 1'000'000'000;
// More threads than a process can have in practice; untouched ones cost nothing.
constexpr std::uint32_t kSlots = 1u << 15;
// Handlers that read at the same time: one a CPU, and a few that were put off theirs. One that
// finds no workspace free drops its sample.
constexpr std::uint32_t kMaxWorkspaces = 256;
constexpr long kSpareWorkspaces = 4;
// Code objects that handlers can see to be known, by hash. A collision costs a wake-up.
constexpr std::uint32_t kKnown = 1u << 14;

// Written by the sampling thread while `tid` is 0 and nobody is within; read by the handler that
// runs on that thread. Never freed: a signal may come late, with the address of a slot that is
// somebody else's by then, and sees that.
struct alignas(64) TimerSlot {
    std::atomic<std::int32_t> tid;
    std::atomic<std::uint32_t> within;  // handlers that look at this slot right now
    std::atomic<const AttachSlot*> attaches;
    std::uintptr_t tstate;
    std::uint64_t id;
    int timer;
    ThreadCache cache;
};

// What a handler reads with: too much for the stack that it may find itself on.
struct Workspace {
    Workspace(const ProcessMemory& with, const ProflinkAbi& abi, const ContextKey& key) noexcept
        : memory(with), snapshotter(memory, abi, key) {}
    ProcessMemory memory;
    Snapshotter snapshotter;
    Chain chain;
};

Immortal<Reserved<TimerSlot>> g_slot_memory;
Reserved<TimerSlot>& g_slots = g_slot_memory.value;
std::uint32_t g_high = 0;
Immortal<Reserved<SignalRecord>> g_record_memory;
Reserved<SignalRecord>& g_records = g_record_memory.value;
struct alignas(Workspace) Raw {
    unsigned char bytes[sizeof(Workspace)];
};
Immortal<Reserved<Raw>> g_workspace_memory;
Reserved<Raw>& g_workspaces = g_workspace_memory.value;
std::uint32_t g_workspace_count = 0;
std::atomic<bool> g_busy[kMaxWorkspaces];
std::atomic<std::uintptr_t> g_known[kKnown];

std::atomic<bool> g_active{false};
std::atomic<CpuTimerWake> g_wake{nullptr};
struct sigaction g_previous;
// Threads that are in somebody else's handler, by their id's last digits.
constexpr std::uint32_t kPassing = 256;
std::atomic<std::int32_t> g_passing[kPassing];
bool g_installed = false;

std::atomic<std::uint64_t> g_refused, g_signals, g_overruns, g_dropped, g_spent_ns;

Workspace& workspace_at(std::uint32_t i) noexcept {
    return *std::launder(reinterpret_cast<Workspace*>(g_workspaces[i].bytes));
}

std::uint64_t monotonic_ns() noexcept {  // no system call, and safe in a handler
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * kSecond +
           static_cast<std::uint64_t>(now.tv_nsec);
}

std::int32_t gettid_now() noexcept { return static_cast<std::int32_t>(syscall(SYS_gettid)); }

std::uint32_t claim_workspace() noexcept {
    for (std::uint32_t i = 0; i < g_workspace_count; ++i) {
        if (!g_busy[i].load(std::memory_order_relaxed) &&
            !g_busy[i].exchange(true, std::memory_order_acquire)) {
            return i;
        }
    }
    return kMaxWorkspaces;
}

std::uint32_t claim_record() noexcept {
    for (std::uint32_t i = 0; i < kRecords; ++i) {
        RecordState expected = RecordState::free;
        if (g_states[i].load(std::memory_order_relaxed) == expected &&
            g_states[i].compare_exchange_strong(expected, RecordState::taken,
                                                std::memory_order_acquire)) {
            return i;
        }
    }
    return kRecords;
}

std::uint32_t known_at(std::uintptr_t code) noexcept {
    return static_cast<std::uint32_t>(mix(code) % kKnown);
}

// On the thread that the slot is of, which cannot go on before this returns.
void take(TimerSlot& slot, std::uint64_t expiries) noexcept {
    const std::uint32_t place = claim_record();
    const std::uint32_t desk = place == kRecords ? kMaxWorkspaces : claim_workspace();
    if (desk == kMaxWorkspaces) {
        if (place != kRecords) g_states[place].store(RecordState::free, std::memory_order_release);
        g_dropped.fetch_add(expiries, std::memory_order_relaxed);
        return;
    }
    Workspace& workspace = workspace_at(desk);
    SignalRecord& record = g_records[place];
    record.deaths = dead_codes().reported();
    const ThreadKey key{slot.tstate, slot.id, slot.tid.load(std::memory_order_relaxed),
                        slot.attaches.load(std::memory_order_acquire), 0};
    record.result =
        workspace.snapshotter.take_own(key, &slot.cache, &workspace.chain, &record.label);
    record.tstate = key.tstate;
    record.id = key.id;
    record.expiries = expiries;
    record.omitted = workspace.chain.omitted;
    record.count = record.result == SnapshotResult::ok ? workspace.chain.count : 0;
    bool all_known = true;
    for (std::uint32_t i = 0; i < record.count; ++i) {
        const Frame& frame = workspace.chain.frames[i];
        record.frames[i] = {frame.code, frame.instruction, frame.copy};
        all_known &= g_known[known_at(frame.code)].load(std::memory_order_relaxed) == frame.code;
    }
    g_busy[desk].store(false, std::memory_order_release);
    g_states[place].store(RecordState::ready, std::memory_order_release);
    // Half of them gone: the sampling thread is late, or there are very many CPUs.
    if (!all_known || place > kRecords / 2) {
        if (const CpuTimerWake wake = g_wake.load(std::memory_order_acquire)) wake();
    }
}

TimerSlot* slot_of(const siginfo_t* info) noexcept {
    if (info == nullptr || info->si_code != SI_TIMER || g_slots.capacity() == 0) return nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_value.sival_ptr);
    const auto begin = reinterpret_cast<std::uintptr_t>(&g_slots[0]);
    if (address < begin || address >= begin + sizeof(TimerSlot) * kSlots ||
        (address - begin) % sizeof(TimerSlot) != 0) {
        return nullptr;
    }
    return &g_slots[static_cast<std::uint32_t>((address - begin) / sizeof(TimerSlot))];
}

void call_previous(int number, siginfo_t* info, void* context) noexcept {
    if ((g_previous.sa_flags & SA_SIGINFO) != 0) {
        if (g_previous.sa_sigaction != nullptr) g_previous.sa_sigaction(number, info, context);
        return;
    }
    if (g_previous.sa_handler == SIG_IGN) return;
    if (g_previous.sa_handler != SIG_DFL) {
        g_previous.sa_handler(number);
        return;
    }
    struct sigaction by_default{};
    by_default.sa_handler = SIG_DFL;
    sigaction(SIGPROF, &by_default, nullptr);
    raise(SIGPROF);  // blocked until the handler returns
}

// A SIGPROF of somebody else's: what would have been done without us. Whoever took the signal from
// us, and lost it to us again at a later start, may pass it back: that is where it ends.
void pass_on(int number, siginfo_t* info, void* context) noexcept {
    const std::int32_t self = gettid_now();
    std::atomic<std::int32_t>& passing = g_passing[static_cast<std::uint32_t>(self) % kPassing];
    if (passing.load(std::memory_order_relaxed) == self) return;
    passing.store(self, std::memory_order_relaxed);
    call_previous(number, info, context);
    passing.store(0, std::memory_order_relaxed);
}

void on_sigprof(int number, siginfo_t* info, void* context) {
    const int error = errno;
    TimerSlot* slot = slot_of(info);
    if (slot == nullptr) {
        pass_on(number, info, context);
        errno = error;
        return;
    }
    slot->within.fetch_add(1, std::memory_order_seq_cst);
    if (g_active.load(std::memory_order_seq_cst) &&
        slot->tid.load(std::memory_order_seq_cst) == gettid_now()) {
        const auto overrun =
            static_cast<std::uint64_t>(info->si_overrun > 0 ? info->si_overrun : 0);
        g_signals.fetch_add(1, std::memory_order_relaxed);
        g_overruns.fetch_add(overrun, std::memory_order_relaxed);
        const std::uint64_t began = monotonic_ns();
        take(*slot, 1 + overrun);
        g_spent_ns.fetch_add(monotonic_ns() - began, std::memory_order_relaxed);
    }
    slot->within.fetch_sub(1, std::memory_order_seq_cst);
    errno = error;
}

// A slot that nobody has and no handler is still in. Taken in turn: the longer one rests, the
// better.
std::uint32_t take_slot() noexcept {
    static std::uint32_t next = 0;
    for (std::uint32_t tried = 0; tried < g_high; ++tried, ++next) {
        const std::uint32_t i = next % g_high;
        if (g_slots[i].tid.load(std::memory_order_seq_cst) == 0 &&
            g_slots[i].within.load(std::memory_order_seq_cst) == 0) {
            ++next;
            return i;
        }
    }
    return g_high < kSlots ? g_high++ : kSlots;
}

// After a stop, handlers that were interrupted half way still hold records and workspaces.
bool nobody_within() noexcept {
    constexpr int kPatience = 100;
    for (std::uint32_t i = 0; i < g_high; ++i) {
        for (int tries = 0; g_slots[i].within.load(std::memory_order_seq_cst) != 0; ++tries) {
            if (tries == kPatience) return false;
            const timespec pause{0, 100'000};
            nanosleep(&pause, nullptr);
        }
    }
    return true;
}

timespec to_timespec(std::uint64_t ns) noexcept {
    return {static_cast<time_t>(ns / kSecond), static_cast<long>(ns % kSecond)};
}

}  // namespace

SignalRecord* cpu_timer_detail::record_at(std::uint32_t i) noexcept { return &g_records[i]; }

bool CpuTimer::open(const ThreadKey& thread, std::uint64_t period_ns,
                    std::uint64_t first_ns) noexcept {
    close();
    const std::uint32_t place = take_slot();
    if (place == kSlots) return g_refused.fetch_add(1, std::memory_order_relaxed), false;
    TimerSlot& slot = g_slots[place];
    slot.tstate = thread.tstate;
    slot.id = thread.id;
    slot.cache = ThreadCache{};
    slot.attaches.store(thread.slot, std::memory_order_relaxed);

    // By system call: the C library's timer_create may allocate.
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGPROF;
    event.sigev_value.sival_ptr = &slot;
#ifdef sigev_notify_thread_id
    event.sigev_notify_thread_id = thread.tid;
#else
    event._sigev_un._tid = thread.tid;
#endif
    const auto clock = static_cast<clockid_t>((~static_cast<unsigned>(thread.tid) << 3) | 6u);
    itimerspec when{};
    when.it_interval = to_timespec(period_ns);
    when.it_value = to_timespec(first_ns != 0 ? first_ns : 1);
    if (syscall(SYS_timer_create, clock, &event, &slot.timer) != 0) {
        g_refused.fetch_add(1, std::memory_order_relaxed);
        return false;
    }
    slot.tid.store(thread.tid, std::memory_order_seq_cst);
    slot_ = place;
    if (syscall(SYS_timer_settime, slot.timer, 0, &when, nullptr) != 0) {
        g_refused.fetch_add(1, std::memory_order_relaxed);
        close();
        return false;
    }
    return true;
}

void CpuTimer::close() noexcept {
    if (slot_ == kNone) return;
    TimerSlot& slot = g_slots[slot_];
    syscall(SYS_timer_delete, slot.timer);
    slot.tid.store(0, std::memory_order_seq_cst);
    slot_ = kNone;
}

void CpuTimer::attaches_at(const AttachSlot* attaches) noexcept {
    if (slot_ == kNone) return;
    g_slots[slot_].attaches.store(attaches, std::memory_order_release);
}

const char* cpu_timers_start(const ProcessMemory& memory, const ProflinkAbi& abi,
                             const ContextKey& key, CpuTimerWake wake) noexcept {
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    const auto workspaces =
        static_cast<std::uint32_t>(std::clamp<long>(cpus + kSpareWorkspaces, 1, kMaxWorkspaces));
    if ((g_slots.capacity() == 0 && !g_slots.reserve(kSlots)) ||
        (g_records.capacity() == 0 && !g_records.reserve(kRecords)) ||
        (g_workspaces.capacity() == 0 && !g_workspaces.reserve(kMaxWorkspaces))) {
        return "no address space for the records of the cpu_timer engine";
    }
    if (!nobody_within()) return "a signal handler of an earlier start has not returned yet";
    for (std::uint32_t i = 0; i < workspaces; ++i) {
        new (g_workspaces[i].bytes) Workspace(memory, abi, key);
        g_busy[i].store(false);
    }
    g_workspace_count = workspaces;
    for (auto& state : g_states) state.store(RecordState::free);
    cpu_timers_know_nothing();
    g_wake.store(wake, std::memory_order_release);
    if (!g_installed || !cpu_timers_own_signal()) {
        struct sigaction ours{};
        ours.sa_sigaction = on_sigprof;
        // Restart what can be restarted; on the thread's own signal stack, where it has one (code
        // that runs on small stacks of its own says so in this way).
        ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
        // A handler that leaves by a jump would leave what this one holds behind.
        sigfillset(&ours.sa_mask);
        // Known before ours is in place: somebody's signal may come at once.
        if (sigaction(SIGPROF, nullptr, &g_previous) != 0 ||
            sigaction(SIGPROF, &ours, nullptr) != 0) {
            return "SIGPROF cannot be handled";
        }
        g_installed = true;
    }
    g_active.store(true, std::memory_order_seq_cst);
    return nullptr;
}

void cpu_timers_stop() noexcept {
    g_active.store(false, std::memory_order_seq_cst);
    g_wake.store(nullptr, std::memory_order_release);
}

bool cpu_timers_own_signal() noexcept {
    struct sigaction now{};
    return sigaction(SIGPROF, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) != 0 &&
           now.sa_sigaction == on_sigprof;
}

void cpu_timers_know(std::uintptr_t code) noexcept {
    g_known[known_at(code)].store(code, std::memory_order_relaxed);
}

void cpu_timers_know_nothing() noexcept {
    for (auto& known : g_known) known.store(0, std::memory_order_relaxed);
}

CpuTimerStats cpu_timers_stats() noexcept {
    return {g_refused.load(), g_signals.load(), g_overruns.load(), g_dropped.load(),
            g_spent_ns.load()};
}

void cpu_timers_after_fork() noexcept {
    g_active.store(false);
    g_wake.store(nullptr);
    for (auto& busy : g_busy) busy.store(false);
    for (auto& state : g_states) state.store(RecordState::free);
    for (std::uint32_t i = 0; i < g_high; ++i) {
        g_slots[i].tid.store(0);
        g_slots[i].within.store(0);
    }
    g_refused = g_signals = g_overruns = g_dropped = g_spent_ns = 0;
}

}  // namespace otel_proflink
