// SPDX-License-Identifier: Apache-2.0
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "sampler_state.hpp"

namespace otel_proflink {
namespace {

// Ticks are moved by up to this fraction of a period, so that they do not beat with the workload.
constexpr std::uint64_t kJitterDivisor = 8;

timespec to_timespec(std::uint64_t ns) noexcept {
    return {static_cast<time_t>(ns / kSecond), static_cast<long>(ns % kSecond)};
}

}  // namespace

const char* Sampler::start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits,
                           Engine engine) noexcept {
    if (running_) return nullptr;
    abi_ = abi;
    period_ns_ = tick_period_ns_ = period_ns;
    awaits_ = awaits;
    stopping_.store(false);
    tick_number_ = 0;
    const char* reason = nullptr;
    if (!memory_.open(&reason)) return reason;
    Profile* last = profile_;
    Profile* fresh = Profile::create(period_ns);
    const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
    pthread_mutex_lock(&mutex_);  // somebody may be measuring the tables
    threads_.clear();
    const bool reserved = threads_.reserve();
    profile_ = fresh;
    const bool begun = profile_ != nullptr && begin_profile(profile_, now);
    budget_.begin(budget_share_, period_ns_, now, 0);  // of a thread that has yet to start
    stats_ = SamplerStats{};
    timers_before_ = cpu_timers_stats();
    earlier_cpu_ns_.store(0);
    pthread_mutex_unlock(&mutex_);
    profile_free(last);
    if (!reserved) return "no address space for the thread table";
    if (!begun) return "no address space for a profile";
    timers_ = begin_timers(engine);
    publish();
    threads_.refresh(0, now, period_ns_, true);

    // The thread inherits a mask with everything blocked: signals are for the application.
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 512 * 1024);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    running_ = true;
    const int error = pthread_create(&thread_, &attributes, thread_main, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (error != 0) {
        end_timers();
        running_ = false;
        return "the sampling thread could not be created";
    }
    pthread_setname_np(thread_, "proflink");
    return nullptr;
}

void Sampler::stop() noexcept {
    if (!running_ || stopping_.exchange(true)) return;
    wake();
    pthread_join(thread_, nullptr);
    pthread_mutex_lock(&mutex_);
    const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
    drain_records(now);
    end_timers();
    close_interval(now);
    threads_.clear();
    running_ = false;
    memory_.close();
    publish();
    pthread_mutex_unlock(&mutex_);
}

void Sampler::ignore(std::int32_t tid, bool ignored) noexcept {
    pthread_mutex_lock(&mutex_);
    threads_.ignore(tid, ignored);
    for (std::uint32_t i = 0; ignored && i < threads_.size(); ++i) {
        if (threads_[i].key.tid != tid) continue;
        // A tick was faster than the thread that says that it is one of ours.
        if (threads_[i].profiled != kNoEntry) {
            profile_->threads[threads_[i].profiled].left_out = true;
        }
        threads_.remove(i--);
    }
    pthread_mutex_unlock(&mutex_);
}

void* Sampler::thread_main(void* self) noexcept {
    auto* sampler = static_cast<Sampler*>(self);
    sampler->tid_.store(static_cast<std::int32_t>(syscall(SYS_gettid)));
    sampler->run();
    sampler->tid_.store(0);
    sampler->earlier_cpu_ns_.fetch_add(clock_ns(CLOCK_THREAD_CPUTIME_ID));
    return nullptr;
}

// Any thread, a signal handler too.
void Sampler::wake() noexcept {
    wakes_.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &wakes_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Sleeps until `deadline`, on the monotonic clock, or until there is something to do.
Sampler::Woken Sampler::sleep_until(std::uint64_t deadline) noexcept {
    const timespec until = to_timespec(deadline);
    for (;;) {
        const std::uint32_t wakes = wakes_.load(std::memory_order_acquire);
        if (stopping_.load()) return Woken::by_stop;
        if (wakes != wakes_seen_) {
            wakes_seen_ = wakes;
            return Woken::by_records;
        }
        // FUTEX_WAIT_BITSET takes an absolute time on CLOCK_MONOTONIC.
        const long result = syscall(SYS_futex, &wakes_, FUTEX_WAIT_BITSET_PRIVATE, wakes, &until,
                                    nullptr, FUTEX_BITSET_MATCH_ANY);
        if (result != 0 && errno == ETIMEDOUT) return Woken::by_time;
    }
}

void Sampler::run() noexcept {
    std::uint64_t nominal = clock_ns(CLOCK_MONOTONIC) + period_ns_;
    for (;;) {
        const std::uint64_t spread = tick_period_ns_ / kJitterDivisor;
        random_ = mix(random_ + 0x9e3779b97f4a7c15u);
        const std::uint64_t deadline = nominal - spread / 2 + random_ % (spread + 1);
        Woken woken = sleep_until(deadline);
        for (; woken == Woken::by_records; woken = sleep_until(deadline)) {
            pthread_mutex_lock(&mutex_);
            drain_records(clock_ns(CLOCK_MONOTONIC));
            pthread_mutex_unlock(&mutex_);
        }
        if (woken == Woken::by_stop) return;
        pthread_mutex_lock(&mutex_);
        const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
        if (now > deadline + tick_period_ns_ / 2) ++stats_.late_ticks;
        tick(now);
        if (budget_.limited()) {
            tick_period_ns_ = budget_.next_period(now, clock_ns(CLOCK_THREAD_CPUTIME_ID));
        }
        publish();
        pthread_mutex_unlock(&mutex_);
        nominal += tick_period_ns_;
        // After a suspension or an overrun: go on from here instead of catching up in a burst.
        if (nominal < now) nominal = now + tick_period_ns_;
    }
}

void Sampler::tick_now() noexcept {
    pthread_mutex_lock(&mutex_);
    tick(clock_ns(CLOCK_MONOTONIC));
    publish();
    pthread_mutex_unlock(&mutex_);
}

Profile* Sampler::swap() noexcept {
    if (profile_ == nullptr) return nullptr;
    Profile* next = Profile::create(period_ns_);
    if (next == nullptr) return nullptr;
    pthread_mutex_lock(&mutex_);
    const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
    Profile* done = profile_;
    if (running_) {
        drain_records(now);
        close_interval(now);
    }
    stats_.table_overflows += done->overflows;
    profile_ = next;
    if (!begin_profile(next, now)) {
        // No address space for the code table: this profile stays empty, the next swap retries.
        ++stats_.table_overflows;
    }
    publish();
    pthread_mutex_unlock(&mutex_);
    return done;
}

float Sampler::fill() noexcept {
    pthread_mutex_lock(&mutex_);
    float fill = profile_ == nullptr ? 0 : profile_->fill();
    if (codes_.fill() > fill) fill = codes_.fill();
    pthread_mutex_unlock(&mutex_);
    return fill;
}

// While the mutex is held.
void Sampler::publish() noexcept {
    SamplerStats stats = stats_;
    if (profile_ != nullptr) stats.table_overflows += profile_->overflows;
    stats.state_guesses = StateFile::available() ? 0 : 1;
    stats.cpu_timer = timers_ ? 1 : 0;
    // The timers count by themselves, and for all runs: whoever asks adds what they say then.
    stats.signals = 0 - timers_before_.signals;
    stats.signal_overruns = 0 - timers_before_.overruns;
    stats.signals_dropped -= timers_before_.dropped;
    stats.signal_ns = 0 - timers_before_.spent_ns;
    stats.timers_refused = 0 - timers_before_.refused;
    stats.period_ns = tick_period_ns_;
    std::uint64_t words[kStats];
    std::memcpy(words, &stats, sizeof(stats));
    for (std::size_t i = 0; i < kStats; ++i) {
        published_[i].store(words[i], std::memory_order_relaxed);
    }
}

SamplerStats Sampler::stats() const noexcept {
    std::uint64_t words[kStats];
    for (std::size_t i = 0; i < kStats; ++i) {
        words[i] = published_[i].load(std::memory_order_relaxed);
    }
    SamplerStats stats;
    std::memcpy(&stats, words, sizeof(stats));
    const CpuTimerStats timers = cpu_timers_stats();
    stats.signals += timers.signals;
    stats.signal_overruns += timers.overruns;
    stats.signals_dropped += timers.dropped;
    stats.signal_ns += timers.spent_ns;
    stats.timers_refused += timers.refused;
    // Not in a tick: each clock costs a system call.
    std::uint64_t cpu = 0;
    const std::int32_t tid = tid_.load();
    if (tid != 0) thread_cpu_ns(tid, &cpu);
    stats.sampler_cpu_ns = earlier_cpu_ns_.load() + cpu;
    return stats;
}

std::uint64_t Sampler::memory() noexcept {
    if (pthread_mutex_trylock(&mutex_) == 0) {
        const std::uint64_t bytes = codes_.resident() + threads_.resident() +
                                    (profile_ == nullptr ? 0 : profile_->resident());
        resident_.store(bytes, std::memory_order_relaxed);
        pthread_mutex_unlock(&mutex_);
    }
    return resident_.load(std::memory_order_relaxed) + link_resident();
}

// The child has one thread and a copy of everything. The parent's samples are the parent's.
void Sampler::after_fork_in_child() noexcept {
    pthread_mutex_init(&mutex_, nullptr);
    running_ = false;
    stopping_.store(false);
    timers_ = false;
    tid_.store(0);
    earlier_cpu_ns_.store(0);
    cpu_timers_after_fork();
    threads_.clear();
    threads_.ignore_none();
    memory_.close();
    profile_free(profile_);
    profile_ = nullptr;
    awaits_ = false;
    stats_ = SamplerStats{};
    timers_before_ = CpuTimerStats{};
    resident_.store(0, std::memory_order_relaxed);
    publish();
}

namespace {

// In static storage and never destroyed: the sampling thread may outlive static destructors.
alignas(Sampler) unsigned char g_storage[sizeof(Sampler)];

Sampler& instance() noexcept {
    static Sampler* sampler = new (g_storage) Sampler();
    return *sampler;
}

bool g_created = false;

void on_fork_prepare() noexcept { instance().before_fork(); }
void on_fork_parent() noexcept { instance().after_fork_in_parent(); }
void on_fork_child() noexcept { instance().after_fork_in_child(); }

}  // namespace

void wake_sampler() noexcept { instance().wake(); }

const char* sampler_start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits,
                          Engine engine) noexcept {
    if (!g_created) {
        instance();
        // C-level forks (uWSGI) run no Python hook: this one always runs.
        if (pthread_atfork(on_fork_prepare, on_fork_parent, on_fork_child) != 0) {
            return "no fork handler could be registered";
        }
        g_created = true;
    }
    return instance().start(abi, period_ns, awaits, engine);
}

void sampler_stop() noexcept {
    if (g_created) instance().stop();
}

bool sampler_running() noexcept { return g_created && instance().running(); }

void sampler_ignore(std::int32_t tid, bool ignored) noexcept { instance().ignore(tid, ignored); }

Profile* sampler_swap() noexcept { return g_created ? instance().swap() : nullptr; }

void sampler_add_awaits(const AwaitSample* samples, std::size_t count) noexcept {
    if (g_created) instance().add_awaits(samples, count);
}

float sampler_fill() noexcept { return g_created ? instance().fill() : 0; }

SamplerStats sampler_stats() noexcept { return g_created ? instance().stats() : SamplerStats{}; }

void sampler_tick() noexcept {
    if (sampler_running()) instance().tick_now();
}

std::uint64_t sampler_memory() noexcept {
    return g_created ? instance().memory() : link_resident();
}

void sampler_keep_frames(std::uint32_t frames) noexcept { instance().keep_frames(frames); }

void sampler_budget(double share) noexcept { instance().set_budget(share); }

const char* sampler_reader() noexcept { return g_created ? instance().reader() : ""; }

}  // namespace otel_proflink
