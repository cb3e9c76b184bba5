// SPDX-License-Identifier: Apache-2.0
//
// What one tick does: which threads it looks at, what it books on which sample.
#include <sched.h>

#include <algorithm>

#include "sampler_state.hpp"

namespace otel_proflink {
namespace {

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

int usable_cpus() noexcept {
    cpu_set_t set;
    // More CPUs than the set holds: more than one, then.
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 2;
}

}  // namespace

void Sampler::tick(std::uint64_t now) noexcept {
    ++stats_.ticks;
    ++tick_number_;
    if (tick_number_ % kAffinityEvery == 1) cpus_ = usable_cpus();
    threads_.refresh(tick_number_, now, period_ns_, false);
    if (timers_) {
        check_timers();
        drain_records(now);
    }
    for (std::uint32_t i = 0; i < threads_.size();) poll(&i, now);
    stats_.threads = threads_.size();
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
    if (timers_) keep_timer(thread);
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
    if (timers_ && recorded_itself(thread, now, moved)) {
        ++*index;
        return;
    }
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
    // In ticks, as of a thread that is read; not in periods, which the budget may change.
    const std::uint64_t count = tick_number_ - thread.counted_tick;
    thread.counted_tick = tick_number_;
    sample.wall_ns += elapsed;
    sample.count += count;
    account(thread, {count, 0, elapsed,
                     sample.state == ThreadState::gil_wait ? elapsed : std::uint64_t{0}});
}

// On the span that the thread's last sample shows.
void Sampler::account(const SampledThread& thread, const LinkTotals& share) noexcept {
    if (thread.linked) link_account(thread.link, share);
}

ThreadState Sampler::state_of(SampledThread& thread) noexcept {
    const bool keep = thread.state_file.is_open() || threads_.open_files() < kMaxOpenFiles;
    return thread.state_file.read(thread.key.tid, abi_.gil_begin, abi_.gil_end, keep);
}

// A runnable thread may be waiting for a CPU: one that was just woken still shows where it slept,
// and what its clock has moved by is the work before that. On another CPU than ours a thread that
// runs moves its clock while it is read. One whose clock stands still was either put off its CPU by
// this very thread, as the holder of the GIL at most times, or waits. Where there is no GIL, see
// was_preempted().
bool Sampler::was_on_cpu(const SampledThread& thread) noexcept {
    std::uint64_t cpu = 0;
    if (!thread_cpu_ns(thread.key.tid, &cpu) || cpu != thread.cpu_ns) return true;
    if (abi_.gil_holder == 0) return false;
    return static_cast<std::uint32_t>(runtime_word(abi_.gil_locked)) != 0 &&
           runtime_word(abi_.gil_holder) == thread.key.tstate;
}

// With one CPU, all clocks stand still while this thread runs. But it put whoever ran off the CPU,
// and the kernel counts that: a thread whose count is what it was has left its CPU by itself since
// it was last looked at, was woken, and waits. The same tells where there is no GIL to ask.
bool Sampler::was_preempted(SampledThread& thread) noexcept {
    const std::uint64_t before = thread.preemptions;
    const bool keep = thread.state_file.is_open();
    return !thread.state_file.preemptions(thread.key.tid, &thread.preemptions, keep) ||
           thread.preemptions != before;
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
    if (link == kUnknownLink) ++stats_.unknown_labels;
    thread.recent_clock_ns = thread.recent_clock_ns * kRecent + static_cast<double>(moved);
    thread.recent_sampled_ns *= kRecent;
    std::uint64_t elapsed = now - thread.polled_ns;
    if (elapsed > 2 * tick_period_ns_ && thread.sample != kNoEntry) {
        // It was asleep for all but about the last period.
        thread.counted_tick = std::min(thread.counted_tick + 1, tick_number_);
        credit_idle(thread, elapsed - tick_period_ns_);
        elapsed = tick_period_ns_;
    }
    thread.counted_tick = tick_number_;
    // Also of a thread that sleeps now: the next look compares with this one.
    const bool preempted = (cpus_ == 1 || abi_.gil_holder == 0) && was_preempted(thread);
    if (thread.profiled == kNoEntry) return true;
    thread.sample = profile_->sample(stack, link, thread.profiled, state, task);
    thread.linked = link != kNoEntry && link != kUnknownLink;
    if (thread.linked) thread.link = thread.cache.label.link;
    if (thread.sample == kNoEntry) return true;
    Sample& sample = profile_->samples[thread.sample];
    ++sample.count;
    sample.wall_ns += elapsed;
    LinkTotals share{1, 0, elapsed, state == ThreadState::gil_wait ? elapsed : std::uint64_t{0}};
    // What a timer says of a thread's CPU is all there is to say.
    const bool timed = thread.timer.is_open() && thread.silent_ns <= silence_ns(period_ns_);
    if (!timed && state == ThreadState::running && moved != 0 &&
        (preempted || (cpus_ != 1 && was_on_cpu(thread)))) {
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
    const std::uint64_t ticks = tick_number_ - interval_began_tick_;
    if (budget_.limited() && ticks != 0) {
        profile_->period_ns = std::max(period_ns_, profile_->duration_ns / ticks);
    }
}

bool Sampler::begin_profile(Profile* profile, std::uint64_t now) noexcept {
    interval_began_ns_ = now;
    interval_began_tick_ = tick_number_;
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

}  // namespace otel_proflink
