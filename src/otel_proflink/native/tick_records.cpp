// SPDX-License-Identifier: Apache-2.0
//
// The sampler's side of the cpu_timer engine: a timer for each thread, and what threads recorded of
// themselves turned into samples. The sweep goes on for all that does not burn CPU.
#include <algorithm>

#include "sampler_state.hpp"

namespace otel_proflink {
namespace {

// Ticks until a timer that the kernel refused is asked for again.
constexpr std::uint64_t kTimerRetry = 1000;

}  // namespace

bool Sampler::begin_timers(Engine engine) noexcept {
    stats_.stood_back = 0;
    return engine == Engine::cpu_timer &&
           cpu_timers_start(memory_, abi_, context_key(), wake_sampler) == nullptr;
}

void Sampler::end_timers() noexcept {
    if (!timers_) return;
    cpu_timers_stop();
    for (std::uint32_t i = 0; i < threads_.size(); ++i) threads_[i].timer.close();
    timers_ = false;
}

// Before anything else in a tick: our timers' signals must not reach somebody else's handler.
void Sampler::check_timers() noexcept {
    if (cpu_timers_own_signal()) return;
    end_timers();
    ++stats_.stood_back;
}

void Sampler::keep_timer(SampledThread& thread) noexcept {
    if (thread.timer.is_open()) {
        thread.timer.attaches_at(thread.key.slot);
        return;
    }
    // The first look is a sweep's: a timer expires when the kernel ticks, some milliseconds of CPU
    // later, and threads that live no longer than that would hardly ever be seen.
    if (thread.timer_retry_tick == 0) {
        thread.timer_retry_tick = tick_number_ + 1;
        return;
    }
    if (tick_number_ < thread.timer_retry_tick) return;
    // Anywhere in the first period, so that it is no matter when the timer was made.
    random_ = mix(random_ + 0x9e3779b97f4a7c15u);
    if (!thread.timer.open(thread.key, period_ns_, 1 + random_ % period_ns_)) {
        thread.timer_retry_tick = tick_number_ + kTimerRetry;
    }
}

// Whether this thread's look is done: it runs, and its timer says what it does. It is not read
// while it moves. Wall time that no record covers yet waits for the next one, or for its sleep.
bool Sampler::recorded_itself(SampledThread& thread, std::uint64_t now,
                              std::uint64_t moved) noexcept {
    if (!thread.timer.is_open()) return false;
    const bool recorded = thread.recorded;
    thread.recorded = false;
    if (!recorded) {
        const bool was_silent = thread.silent_ns > silence_ns(period_ns_);
        thread.silent_ns += moved;
        if (thread.silent_ns > silence_ns(period_ns_)) {
            if (!was_silent) ++stats_.silent_threads;
            return false;
        }
    }
    if (state_of(thread) != ThreadState::running) return false;
    if (recorded && thread.sample != kNoEntry) {
        const std::uint64_t elapsed = now - thread.polled_ns;
        profile_->samples[thread.sample].wall_ns += elapsed;
        account(thread, {0, 0, elapsed, 0});
        thread.polled_ns = now;
    }
    thread.counted_tick = tick_number_;  // its records count themselves
    thread.fresh = true;
    return true;
}

void Sampler::drain_records(std::uint64_t now) noexcept {
    if (!timers_ || profile_ == nullptr) return;
    cpu_timers_drain([&](const SignalRecord& record) noexcept { book(record, now); });
}

void Sampler::book(const SignalRecord& record, std::uint64_t now) noexcept {
    SampledThread* found = threads_.find(record.tstate, record.id);
    if (found == nullptr || record.result == SnapshotResult::gone ||
        profiled_thread(*found) == kNoEntry) {
        stats_.signals_dropped += record.expiries;
        return;
    }
    SampledThread& thread = *found;
    ++stats_.snapshots;
    chain_.count = record.count;
    chain_.omitted = record.omitted;
    for (std::uint32_t i = 0; i < record.count; ++i) {
        chain_.frames[i] = Frame{
            record.frames[i].code, record.frames[i].code, 0, record.frames[i].instruction, 0, true,
            record.frames[i].copy};
    }
    std::uint32_t stack = 0;
    if (record.result == SnapshotResult::no_frames) {
        stack = profile_->marker_stack("[no Python frame]");
    } else if (record.result == SnapshotResult::ok && codes_.visit_late(chain_, record.deaths)) {
        stack = codes_.intern_stack();
        for (std::uint32_t i = 0; i < record.count; ++i) cpu_timers_know(record.frames[i].code);
    } else {
        ++stats_.give_ups;
        stack = profile_->marker_stack("[unreadable]");
    }
    std::uint32_t link = kNoEntry;
    if (record.label.state == LabelState::unknown) {
        link = kUnknownLink;
    } else if (record.label.state == LabelState::linked) {
        link = profile_->link(record.label.link);
    }
    if (link == kUnknownLink) stats_.unknown_labels += record.expiries;
    const std::uint32_t entry =
        profile_->sample(stack, link, thread.profiled, ThreadState::running, record.label.task);
    if (entry == kNoEntry) return;
    // A thread that had the signal blocked was swept meanwhile: that CPU is booked.
    const bool silent = thread.silent_ns > silence_ns(period_ns_);
    const std::uint64_t expiries = silent ? 1 : record.expiries;
    const std::uint64_t cpu = expiries * period_ns_;
    const std::uint64_t wall = std::min(cpu, now - thread.polled_ns);
    Sample& sample = profile_->samples[entry];
    sample.count += expiries;
    sample.cpu_ns += cpu;
    sample.wall_ns += wall;
    profile_->threads[thread.profiled].cpu_sampled_ns += cpu;
    thread.polled_ns += wall;
    thread.sample = entry;
    thread.linked = link != kNoEntry && link != kUnknownLink;
    if (thread.linked) thread.link = record.label.link;
    thread.recorded = true;
    thread.fresh = true;  // where it is now is another question
    thread.silent_ns = 0;
    thread.next_tick = 0;
    account(thread, {expiries, cpu, wall, 0});
}

}  // namespace otel_proflink
