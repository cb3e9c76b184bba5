// SPDX-License-Identifier: Apache-2.0
//
// The sampler's state. What works on it: its life cycle (sampler.cpp), what a tick does (tick.cpp),
// and what timers have recorded since (tick_records.cpp).
#pragma once

#include <pthread.h>
#include <time.h>

#include <atomic>

#include "code.hpp"
#include "cpu_budget.hpp"
#include "sampler.hpp"
#include "threads.hpp"

namespace otel_proflink {

inline constexpr std::uint64_t kSecond = 1'000'000'000;

inline std::uint64_t clock_ns(clockid_t clock) noexcept {
    timespec time;
    clock_gettime(clock, &time);
    return static_cast<std::uint64_t>(time.tv_sec) * kSecond +
           static_cast<std::uint64_t>(time.tv_nsec);
}

// CPU that a thread may burn before it is said to get no signals: they come late, not at once.
inline std::uint64_t silence_ns(std::uint64_t period_ns) noexcept {
    return 8 * period_ns + 50'000'000;
}

// For signal handlers.
void wake_sampler() noexcept;

class Sampler {
  public:
    Sampler() noexcept
        : threads_(memory_, abi_),
          codes_(memory_, abi_),
          snapshotter_(memory_, abi_, context_key()) {}

    const char* start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits,
                      Engine engine) noexcept;
    void stop() noexcept;
    bool running() const noexcept { return running_; }
    void ignore(std::int32_t tid, bool ignored) noexcept;
    void add_awaits(const AwaitSample* samples, std::size_t count) noexcept;
    Profile* swap() noexcept;
    float fill() noexcept;
    SamplerStats stats() const noexcept;
    std::uint64_t memory() noexcept;
    void set_budget(double share) noexcept { budget_share_ = share; }
    const char* reader() const noexcept { return memory_.name(); }

    // Of each stack; before a start.
    void keep_frames(std::uint32_t frames) noexcept { codes_.keep(frames); }
    void wake() noexcept;
    void tick_now() noexcept;

    void before_fork() noexcept { pthread_mutex_lock(&mutex_); }
    void after_fork_in_parent() noexcept { pthread_mutex_unlock(&mutex_); }
    void after_fork_in_child() noexcept;

  private:
    static void* thread_main(void* self) noexcept;
    void run() noexcept;
    enum class Woken : std::uint8_t { by_time, by_stop, by_records };
    Woken sleep_until(std::uint64_t deadline) noexcept;
    void tick(std::uint64_t now) noexcept;
    void poll(std::uint32_t* index, std::uint64_t now) noexcept;
    bool observe(SampledThread& thread, std::uint64_t now, std::uint64_t cpu_moved) noexcept;
    void credit_idle(SampledThread& thread, std::uint64_t elapsed) noexcept;
    void account(const SampledThread& thread, const LinkTotals& share) noexcept;
    void close_interval(std::uint64_t now) noexcept;
    void publish() noexcept;
    bool begin_profile(Profile* profile, std::uint64_t now) noexcept;
    std::uint32_t profiled_thread(SampledThread& thread) noexcept;
    bool begin_timers(Engine engine) noexcept;
    void keep_timer(SampledThread& thread) noexcept;
    void check_timers() noexcept;
    void end_timers() noexcept;
    bool recorded_itself(SampledThread& thread, std::uint64_t now, std::uint64_t moved) noexcept;
    void drain_records(std::uint64_t now) noexcept;
    void book(const SignalRecord& record, std::uint64_t now) noexcept;
    ThreadState state_of(SampledThread& thread) noexcept;
    bool was_on_cpu(const SampledThread& thread) noexcept;
    bool was_preempted(SampledThread& thread) noexcept;

    ProflinkAbi abi_{};
    ProcessMemory memory_;
    ThreadList threads_;
    CodeTable codes_;
    Snapshotter snapshotter_;
    Chain chain_;
    Profile* profile_ = nullptr;

    // Held for the length of a tick, a swap or a fork; application threads meet it only in fork.
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_t thread_{};
    bool running_ = false;
    std::atomic<std::int32_t> tid_{0};              // of the sampling thread, 0: none
    std::atomic<std::uint64_t> earlier_cpu_ns_{0};  // of those that have ended
    std::atomic<bool> stopping_{false};
    // Moves when the thread is to look up. A futex, so that a tick's sleep costs one system call.
    std::atomic<std::uint32_t> wakes_{0};
    std::uint32_t wakes_seen_ = 0;
    bool timers_ = false;               // the engine is cpu_timer
    std::uint64_t period_ns_ = 0;       // as asked for
    std::uint64_t tick_period_ns_ = 0;  // as the budget allows: how far ticks are apart now
    double budget_share_ = 0;
    CpuBudget budget_;
    std::uint64_t interval_began_ns_ = 0;
    std::uint64_t interval_began_tick_ = 0;
    std::uint64_t tick_number_ = 0;
    bool awaits_ = false;
    int cpus_ = 1;  // that this thread may run on
    std::uint64_t random_ = 0x9e3779b97f4a7c15u;
    SamplerStats stats_{};
    CpuTimerStats timers_before_{};  // what an earlier run has counted
    // A copy for everyone else, each number by itself: whoever asks must not wait for a tick.
    static constexpr std::size_t kStats = sizeof(SamplerStats) / sizeof(std::uint64_t);
    std::atomic<std::uint64_t> published_[kStats]{};
    std::atomic<std::uint64_t> resident_{0};
};

}  // namespace otel_proflink
