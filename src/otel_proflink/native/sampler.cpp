// SPDX-License-Identifier: Apache-2.0
#include "sampler.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <new>

#include "code.hpp"
#include "threads.hpp"

namespace otel_proflink {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
// A snapshot takes about 10 us. Work that changes its span or its callers more often than that
// tears most of them; eight attempts keep the unreadable share small and the tick bounded.
constexpr int kAttempts = 8;
// A thread that has been idle this long is looked at less often, up to every kMaxBackoff ticks:
// even its clock costs half a microsecond. An attach brings it back at once.
constexpr std::uint32_t kIdlePolls = 20;
constexpr std::uint64_t kMaxBackoff = 16;
// With very many idle threads, about this many are looked at in a tick.
constexpr std::uint32_t kIdlePollsPerTick = 24;
// State files kept open for busy threads, so that the host's descriptors stay the host's.
constexpr std::uint32_t kMaxOpenFiles = 24;
// What a look at a thread still counts for sixteen looks later is a third.
constexpr double kRecent = 15.0 / 16.0;
// Ticks between two looks at how many CPUs there are for us.
constexpr std::uint64_t kAffinityEvery = 256;
// Coroutines of one waiting task that are kept, from the innermost on.
constexpr std::uint32_t kMaxAwaitFrames = 128;
// Ticks are moved by up to this fraction of a period, so that they do not beat with the workload.
constexpr std::uint64_t kJitterDivisor = 8;

std::uint64_t clock_ns(clockid_t clock) noexcept {
    timespec time;
    clock_gettime(clock, &time);
    return static_cast<std::uint64_t>(time.tv_sec) * kSecond +
           static_cast<std::uint64_t>(time.tv_nsec);
}

int usable_cpus() noexcept {
    cpu_set_t set;
    // More CPUs than the set holds: more than one, then.
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 2;
}

timespec to_timespec(std::uint64_t ns) noexcept {
    return {static_cast<time_t>(ns / kSecond), static_cast<long>(ns % kSecond)};
}

class Sampler {
  public:
    Sampler() noexcept
        : threads_(memory_, abi_),
          codes_(memory_, abi_),
          snapshotter_(memory_, abi_, context_key()) {}

    const char* start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits) noexcept;
    void stop() noexcept;
    bool running() const noexcept { return running_; }
    void ignore(std::int32_t tid, bool ignored) noexcept;
    void add_awaits(const AwaitSample* samples, std::size_t count) noexcept;
    Profile* swap() noexcept;
    float fill() noexcept;
    SamplerStats stats() noexcept;
    const char* reader() const noexcept { return memory_.name(); }

    void before_fork() noexcept { pthread_mutex_lock(&mutex_); }
    void after_fork_in_parent() noexcept { pthread_mutex_unlock(&mutex_); }
    void after_fork_in_child() noexcept;

  private:
    static void* thread_main(void* self) noexcept;
    void run() noexcept;
    bool sleep_until(std::uint64_t deadline) noexcept;
    void tick(std::uint64_t now) noexcept;
    void poll(std::uint32_t* index, std::uint64_t now) noexcept;
    bool observe(SampledThread& thread, std::uint64_t now, std::uint64_t cpu_moved) noexcept;
    void credit_idle(SampledThread& thread, std::uint64_t elapsed) noexcept;
    void account(const SampledThread& thread, const LinkTotals& share) noexcept;
    void close_interval(std::uint64_t now) noexcept;
    bool begin_profile(Profile* profile, std::uint64_t now) noexcept;
    std::uint32_t profiled_thread(SampledThread& thread) noexcept;
    ThreadState state_of(SampledThread& thread) noexcept;
    bool was_on_cpu(const SampledThread& thread) noexcept;

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
    // 1: the thread is to end. A futex, so that a tick's sleep costs one system call.
    std::atomic<std::uint32_t> stopping_{0};
    std::uint64_t period_ns_ = 0;
    std::uint64_t interval_began_ns_ = 0;
    std::uint64_t tick_number_ = 0;
    bool awaits_ = false;
    int cpus_ = 1;  // that this thread may run on
    std::uint64_t random_ = 0x9e3779b97f4a7c15u;
    SamplerStats stats_{};
};

const char* Sampler::start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits) noexcept {
    if (running_) return nullptr;
    abi_ = abi;
    period_ns_ = period_ns;
    awaits_ = awaits;
    stopping_.store(0);
    tick_number_ = 0;
    const char* reason = nullptr;
    if (!memory_.open(&reason)) return reason;
    threads_.clear();
    if (threads_.reserve() == false) return "no address space for the thread table";
    profile_free(profile_);
    profile_ = Profile::create(period_ns);
    const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (profile_ == nullptr || !begin_profile(profile_, now)) {
        return "no address space for a profile";
    }
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
        running_ = false;
        return "the sampling thread could not be created";
    }
    pthread_setname_np(thread_, "proflink");
    return nullptr;
}

void Sampler::stop() noexcept {
    if (!running_ || stopping_.exchange(1) != 0) return;
    syscall(SYS_futex, &stopping_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
    pthread_join(thread_, nullptr);
    pthread_mutex_lock(&mutex_);
    close_interval(clock_ns(CLOCK_MONOTONIC));
    threads_.clear();
    running_ = false;
    memory_.close();
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
    static_cast<Sampler*>(self)->run();
    return nullptr;
}

// Sleeps until `deadline`, on the monotonic clock; true when the thread is to end.
bool Sampler::sleep_until(std::uint64_t deadline) noexcept {
    const timespec until = to_timespec(deadline);
    while (stopping_.load() == 0) {
        // FUTEX_WAIT_BITSET takes an absolute time on CLOCK_MONOTONIC.
        const long result = syscall(SYS_futex, &stopping_, FUTEX_WAIT_BITSET_PRIVATE, 0, &until,
                                    nullptr, FUTEX_BITSET_MATCH_ANY);
        if (result != 0 && errno == ETIMEDOUT) return false;
    }
    return true;
}

void Sampler::run() noexcept {
    std::uint64_t nominal = clock_ns(CLOCK_MONOTONIC) + period_ns_;
    const std::uint64_t spread = period_ns_ / kJitterDivisor;
    for (;;) {
        random_ = mix(random_ + 0x9e3779b97f4a7c15u);
        const std::uint64_t deadline = nominal - spread / 2 + random_ % (spread + 1);
        if (sleep_until(deadline)) return;
        pthread_mutex_lock(&mutex_);
        const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
        if (now > deadline + period_ns_ / 2) ++stats_.late_ticks;
        tick(now);
        pthread_mutex_unlock(&mutex_);
        nominal += period_ns_;
        // After a suspension or an overrun: go on from here instead of catching up in a burst.
        if (nominal < now) nominal = now + period_ns_;
    }
}

void Sampler::tick(std::uint64_t now) noexcept {
    ++stats_.ticks;
    ++tick_number_;
    if (tick_number_ % kAffinityEvery == 1) cpus_ = usable_cpus();
    threads_.refresh(tick_number_, now, period_ns_, false);
    for (std::uint32_t i = 0; i < threads_.size();) poll(&i, now);
    stats_.threads = threads_.size();
    stats_.sampler_cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    stats_.read_errors = memory_.failures();
}

// Looks at one thread if it is due. Steps `*index` on, or removes the thread.
void Sampler::poll(std::uint32_t* index, std::uint64_t now) noexcept {
    SampledThread& thread = threads_[*index];
    const AttachSlot* slot = thread.key.slot;
    const std::uint64_t attaches =
        slot == nullptr ? 0 : slot->begun.load(std::memory_order_relaxed);
    if (tick_number_ < thread.next_tick && attaches == thread.attaches) {
        ++*index;
        return;
    }
    std::uint64_t cpu = 0;
    if (!thread_cpu_ns(thread.key.tid, &cpu)) {
        if (thread.profiled != kNoEntry) stats_.cpu_not_sampled_ns += thread.cpu_carried_ns;
        threads_.remove(*index);
        return;
    }
    const std::uint64_t moved = cpu > thread.cpu_ns ? cpu - thread.cpu_ns : 0;
    const std::uint64_t elapsed = now - thread.polled_ns;
    // Its own page of the tables may be full; then it goes unrecorded, and the overflow is counted.
    const std::uint32_t profiled = profiled_thread(thread);
    if (profiled != kNoEntry) profile_->threads[profiled].cpu_clock_ns += moved;
    if (moved == 0 && !thread.fresh) {
        // It has not run: same stack, same label, same state as when it was last read.
        credit_idle(thread, elapsed);
        thread.attaches = attaches;
        thread.polled_ns = now;
        if (++thread.idle_polls > kIdlePolls) {
            const std::uint64_t step = thread.idle_polls - kIdlePolls + 1;
            const std::uint64_t most =
                std::max<std::uint64_t>(kMaxBackoff, threads_.size() / kIdlePollsPerTick);
            thread.next_tick = tick_number_ + std::min(step, most);
            thread.state_file.close();
        }
        ++*index;
        return;
    }
    thread.attaches = attaches;
    thread.cpu_ns = cpu;
    if (moved != 0) thread.idle_polls = 0;
    thread.next_tick = 0;
    if (!observe(thread, now, moved)) {
        threads_.remove(*index);
        threads_.distrust();
        return;
    }
    thread.polled_ns = now;
    thread.fresh = false;
    ++*index;
}

std::uint32_t Sampler::profiled_thread(SampledThread& thread) noexcept {
    if (thread.profiled == kNoEntry) {
        thread.profiled = profile_->thread(thread.key.id, thread.key.tid);
        if (thread.profiled != kNoEntry) {
            profile_->threads[thread.profiled].cpu_clock_ns += thread.cpu_carried_ns;
            thread.cpu_carried_ns = 0;
        }
    }
    return thread.profiled;
}

void Sampler::credit_idle(SampledThread& thread, std::uint64_t elapsed) noexcept {
    if (thread.sample == kNoEntry) return;
    Sample& sample = profile_->samples[thread.sample];
    const std::uint64_t count = (elapsed + period_ns_ / 2) / period_ns_;
    sample.wall_ns += elapsed;
    sample.count += count;
    account(thread, {count, 0, elapsed,
                     sample.state == ThreadState::gil_wait ? elapsed : std::uint64_t{0}});
}

// On the span that the thread's last sample shows.
void Sampler::account(const SampledThread& thread, const LinkTotals& share) noexcept {
    const std::uint32_t link = profile_->samples[thread.sample].link;
    if (link == kNoEntry || link == kUnknownLink) return;
    if (thread.cache.label.state == LabelState::linked) {
        link_account(thread.cache.label.link, share);
    }
}

ThreadState Sampler::state_of(SampledThread& thread) noexcept {
    const bool keep = thread.state_file.is_open() || threads_.open_files() < kMaxOpenFiles;
    return thread.state_file.read(thread.key.tid, abi_.gil_begin, abi_.gil_end, keep);
}

// A runnable thread may be waiting for a CPU: one that was just woken still shows where it slept,
// and what its clock has moved by is the work before that. On another CPU than ours a thread that
// runs moves its clock while it is read. One whose clock stands still was either put off its CPU by
// this very thread, as the holder of the GIL at most times, or waits. With one CPU only, all of
// them are off it and nothing tells.
bool Sampler::was_on_cpu(const SampledThread& thread) noexcept {
    std::uint64_t cpu = 0;
    if (cpus_ == 1 || !thread_cpu_ns(thread.key.tid, &cpu) || cpu != thread.cpu_ns) return true;
    std::uintptr_t holder = 0;
    std::int32_t locked = 0;
    const ReadRequest requests[] = {{abi_.gil_holder, &holder, sizeof(holder)},
                                    {abi_.gil_locked, &locked, sizeof(locked)}};
    return !memory_.read(requests, 2) || (locked != 0 && holder == thread.key.tstate);
}

// Reads one thread and books what it shows. False: the thread state is not this thread's any more.
bool Sampler::observe(SampledThread& thread, std::uint64_t now, std::uint64_t moved) noexcept {
    ++stats_.snapshots;
    SnapshotResult result = SnapshotResult::torn;
    ThreadState state = ThreadState::blocked;
    std::uint64_t cpu_before = thread.cpu_ns;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        if (attempt != 0) {
            ++stats_.retries;
            threads_.resolve_slots();
        }
        codes_.prepare();
        result = snapshotter_.take(thread.key, &thread.cache, &chain_, &codes_);
        codes_.rollback();
        if (result == SnapshotResult::gone) return false;
        if (result == SnapshotResult::torn) continue;
        // The state must hold for the stack: a thread that sleeps now must not have run since
        // before the snapshot, else it may have gone to sleep elsewhere.
        state = state_of(thread);
        std::uint64_t cpu = 0;
        if (state == ThreadState::running) break;
        if (thread_cpu_ns(thread.key.tid, &cpu) && cpu == cpu_before) break;
        cpu_before = cpu;
        result = SnapshotResult::torn;
    }

    std::uint32_t stack = 0;
    std::uint32_t link = kNoEntry;
    std::uint64_t task = 0;
    if (result == SnapshotResult::torn) {
        ++stats_.give_ups;
        stack = profile_->marker_stack("[unreadable]");
        link = kUnknownLink;
    } else {
        stack = result == SnapshotResult::ok ? codes_.intern_stack()
                                             : profile_->marker_stack("[no Python frame]");
        task = thread.cache.label.task;
        if (thread.cache.label.state == LabelState::linked) {
            link = profile_->link(thread.cache.label.link);
        }
    }
    thread.recent_clock_ns = thread.recent_clock_ns * kRecent + static_cast<double>(moved);
    thread.recent_sampled_ns *= kRecent;
    std::uint64_t elapsed = now - thread.polled_ns;
    if (elapsed > 2 * period_ns_ && thread.sample != kNoEntry) {
        // It was asleep for all but about the last period.
        credit_idle(thread, elapsed - period_ns_);
        elapsed = period_ns_;
    }
    if (thread.profiled == kNoEntry) return true;
    thread.sample = profile_->sample(stack, link, thread.profiled, state, task);
    if (thread.sample == kNoEntry) return true;
    Sample& sample = profile_->samples[thread.sample];
    ++sample.count;
    sample.wall_ns += elapsed;
    LinkTotals share{1, 0, elapsed, state == ThreadState::gil_wait ? elapsed : std::uint64_t{0}};
    if (state == ThreadState::running && moved != 0 && was_on_cpu(thread)) {
        sample.cpu_ns += elapsed;
        profile_->threads[thread.profiled].cpu_sampled_ns += elapsed;
        // The encoder knows the whole interval; a span may end now.
        thread.recent_sampled_ns += static_cast<double>(elapsed);
        share.cpu_ns = static_cast<std::uint64_t>(
            static_cast<double>(elapsed) * thread.recent_clock_ns / thread.recent_sampled_ns);
    }
    account(thread, share);
    return true;
}

// Books everything up to `now`, so that weights add up to the interval.
void Sampler::close_interval(std::uint64_t now) noexcept {
    for (std::uint32_t i = 0; i < threads_.size(); ++i) {
        SampledThread& thread = threads_[i];
        std::uint64_t cpu = 0;
        const bool alive = thread_cpu_ns(thread.key.tid, &cpu);
        const std::uint32_t profiled = profiled_thread(thread);
        if (profiled != kNoEntry) {
            ProfiledThread& total = profile_->threads[profiled];
            if (alive && cpu > thread.cpu_ns) total.cpu_clock_ns += cpu - thread.cpu_ns;
            if (total.cpu_sampled_ns == 0) {
                thread.cpu_carried_ns = total.cpu_clock_ns;
                total.cpu_clock_ns = 0;
            }
        }
        if (alive) thread.cpu_ns = cpu;
        credit_idle(thread, now - thread.polled_ns);
        thread.polled_ns = now;
        thread.sample = thread.profiled = kNoEntry;
        thread.fresh = true;
        // Threads that sleep on are read again for the new profile, but not all in one tick.
        if (thread.idle_polls > kIdlePolls) thread.next_tick = tick_number_ + 1 + i % kMaxBackoff;
    }
    profile_->duration_ns = now - interval_began_ns_;
}

bool Sampler::begin_profile(Profile* profile, std::uint64_t now) noexcept {
    interval_began_ns_ = now;
    profile->start_unix_ns = clock_ns(CLOCK_REALTIME);
    profile->awaits = awaits_;
    return codes_.begin(profile, &dead_codes());
}

void Sampler::add_awaits(const AwaitSample* samples, std::size_t count) noexcept {
    pthread_mutex_lock(&mutex_);
    for (std::size_t i = 0; profile_ != nullptr && i < count; ++i) {
        const AwaitSample& from = samples[i];
        std::uint32_t places[kMaxAwaitFrames];
        std::uint32_t depth = 0;
        for (; depth < from.count && depth < kMaxAwaitFrames; ++depth) {
            const AwaitFrame& frame = from.frames[depth];
            places[depth] = profile_->location(
                profile_->function(profile_->string(frame.name, frame.name_size),
                                   profile_->string(frame.file, frame.file_size), frame.first_line),
                frame.line);
        }
        LinkData data{};
        const bool linked =
            link_read(reinterpret_cast<std::uintptr_t>(from.record), from.serial, &data);
        const std::uint32_t entry = profile_->sample(profile_->stack(places, depth),
                                                     linked ? profile_->link(data) : kNoEntry,
                                                     kNoEntry, ThreadState::blocked, from.task);
        if (entry != kNoEntry) profile_->samples[entry].await_ns += from.wait_ns;
    }
    pthread_mutex_unlock(&mutex_);
}

Profile* Sampler::swap() noexcept {
    if (profile_ == nullptr) return nullptr;
    Profile* next = Profile::create(period_ns_);
    if (next == nullptr) return nullptr;
    pthread_mutex_lock(&mutex_);
    const std::uint64_t now = clock_ns(CLOCK_MONOTONIC);
    Profile* done = profile_;
    if (running_) close_interval(now);
    stats_.table_overflows += done->overflows;
    profile_ = next;
    if (!begin_profile(next, now)) {
        // No address space for the code table: this profile stays empty, the next swap retries.
        ++stats_.table_overflows;
    }
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

SamplerStats Sampler::stats() noexcept {
    pthread_mutex_lock(&mutex_);
    SamplerStats stats = stats_;
    if (profile_ != nullptr) stats.table_overflows += profile_->overflows;
    stats.state_guesses = StateFile::available() ? 0 : 1;
    pthread_mutex_unlock(&mutex_);
    return stats;
}

// The child has one thread and a copy of everything. The parent's samples are the parent's.
void Sampler::after_fork_in_child() noexcept {
    pthread_mutex_init(&mutex_, nullptr);
    running_ = false;
    stopping_.store(0);
    threads_.clear();
    threads_.ignore_none();
    memory_.close();
    profile_free(profile_);
    profile_ = nullptr;
    awaits_ = false;
    stats_ = SamplerStats{};
}

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

const char* sampler_start(const ProflinkAbi& abi, std::uint64_t period_ns, bool awaits) noexcept {
    if (!g_created) {
        instance();
        // C-level forks (uWSGI) run no Python hook: this one always runs.
        if (pthread_atfork(on_fork_prepare, on_fork_parent, on_fork_child) != 0) {
            return "no fork handler could be registered";
        }
        g_created = true;
    }
    return instance().start(abi, period_ns, awaits);
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

const char* sampler_reader() noexcept { return g_created ? instance().reader() : ""; }

}  // namespace otel_proflink
