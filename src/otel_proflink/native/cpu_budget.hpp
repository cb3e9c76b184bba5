// SPDX-License-Identifier: Apache-2.0
//
// How long the sampler sleeps between two ticks so that it stays within a share of one CPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace otel_proflink {

// Reads no clock: the caller says what time it is, and what the sampler's thread has burnt.
//
// Two rules, and the longer sleep counts. On average: a tick's mean cost, over the share, is the
// period. That is no feedback from the period to itself, so there is nothing to oscillate. In a
// burst, which the mean is slow to show: what was burnt beyond the share is owed, and at most one
// second's worth may be. So over any time t the sampler burns at most `share * (t + 1 s)` and one
// tick, as long as a tick costs less than one second's worth; beyond that, see kMaxPeriod.
//
// All threads alike are looked at less often: a busy one is still read in every tick, and nobody's
// turn depends on how many others there are.
class CpuBudget {
  public:
    // 1 Hz, the lowest rate that may be asked for: at the default interval a file still holds sixty
    // looks at a thread. Less would be no profile of anything; the budget is missed instead, which
    // the counters say.
    static constexpr std::uint64_t kMaxPeriod = 1'000'000'000;

    // `share`: of one CPU, 0 for no limit. `period_ns`: with no need to save, at most kMaxPeriod.
    void begin(double share, std::uint64_t period_ns, std::uint64_t now_ns,
               std::uint64_t cpu_ns) noexcept {
        share_ = share;
        period_ns_ = period_ns;
        now_ns_ = now_ns;
        cpu_ns_ = cpu_ns;
        mean_ns_ = debt_ns_ = 0;
    }

    bool limited() const noexcept { return share_ > 0; }

    // After each tick, with both clocks as they are then: the time until the next.
    std::uint64_t next_period(std::uint64_t now_ns, std::uint64_t cpu_ns) noexcept {
        if (!limited()) return period_ns_;
        const auto elapsed = static_cast<double>(now_ns - now_ns_);
        const auto cost = static_cast<double>(cpu_ns - cpu_ns_);
        now_ns_ = now_ns;
        cpu_ns_ = cpu_ns;
        // About eight ticks, but no more than a second or two: at 1 Hz it must not take eight to
        // see that the load has gone.
        mean_ns_ += (cost - mean_ns_) * std::max(1.0 / 8, elapsed / (elapsed + kSecondNs));
        const double second = share_ * kSecondNs;
        // Nothing is saved up, or a quiet hour would pay for a burst. Nor is more than another
        // second owed: a time in which the budget could not be held is not paid for afterwards.
        debt_ns_ = std::clamp(debt_ns_ + cost - share_ * elapsed, 0.0, 2 * second);
        const double period = std::max(mean_ns_, debt_ns_ - second) / share_;
        return static_cast<std::uint64_t>(
            std::clamp(period, static_cast<double>(period_ns_), static_cast<double>(kMaxPeriod)));
    }

  private:
    static constexpr double kSecondNs = 1e9;

    double share_ = 0;
    std::uint64_t period_ns_ = 0;
    std::uint64_t now_ns_ = 0;
    std::uint64_t cpu_ns_ = 0;
    double mean_ns_ = 0;  // of what a tick costs
    double debt_ns_ = 0;  // burnt beyond the share
};

}  // namespace otel_proflink
