// SPDX-License-Identifier: Apache-2.0
//
// The budget with a clock that only the tests move: a tick costs what a function says it does.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "cpu_budget.hpp"

namespace otel_proflink::test {
namespace {

constexpr double kSecond = 1e9;
constexpr std::uint64_t kMillisecond = 1'000'000;

// Nanoseconds that a tick costs, by the time (in seconds) and the time since the last tick.
using Cost = std::function<double(double now_s, double period_ns)>;

struct Ticks {
    std::vector<double> at;      // seconds
    std::vector<double> spent;   // CPU seconds by then
    std::vector<double> period;  // seconds that it ordered

    double period_at(double time) const {
        for (std::size_t i = at.size(); i-- > 0;) {
            if (at[i] <= time) return period[i];
        }
        return 0;
    }
    double spent_between(double from, double to) const {
        double first = 0, last = 0;
        for (std::size_t i = 0; i < at.size(); ++i) {
            if (at[i] <= from) first = spent[i];
            if (at[i] <= to) last = spent[i];
        }
        return last - first;
    }
    double most_expensive() const {
        double most = 0;
        for (std::size_t i = 0; i < at.size(); ++i) {
            most = std::max(most, spent[i] - (i == 0 ? 0 : spent[i - 1]));
        }
        return most;
    }
};

Ticks run(double share, std::uint64_t period_ns, double seconds, const Cost& cost) {
    CpuBudget budget;
    // Clocks do not begin at zero.
    const std::uint64_t began = 77 * 1'000'000'000ull;
    std::uint64_t now = began, cpu = 12345;
    budget.begin(share, period_ns, now, cpu);
    std::uint64_t period = period_ns;
    Ticks ticks;
    while (static_cast<double>(now - began) < seconds * kSecond) {
        now += period;
        const double at = static_cast<double>(now - began) / kSecond;
        const auto burnt = static_cast<std::uint64_t>(cost(at, static_cast<double>(period)));
        cpu += burnt;
        period = budget.next_period(now, cpu);
        ticks.at.push_back(at);
        ticks.spent.push_back(static_cast<double>(cpu - 12345) / kSecond);
        ticks.period.push_back(static_cast<double>(period) / kSecond);
        // The next tick cannot begin before this one is over.
        period = std::max(period, burnt);
    }
    return ticks;
}

Cost always(double ms) {
    return [ms](double, double) { return ms * 1e6; };
}

// At every tick, not only at the end: `share * (t + 1 s)` and one tick.
void expect_bound(const Ticks& ticks, double share) {
    for (std::size_t i = 0; i < ticks.at.size(); ++i) {
        ASSERT_LE(ticks.spent[i], share * (ticks.at[i] + 1) + ticks.most_expensive() + 1e-6)
            << "after " << ticks.at[i] << " s";
    }
}

TEST(CpuBudget, WithoutALimitNothingIsStretched) {
    for (const double period : run(0, kMillisecond, 5, always(4)).period) {
        ASSERT_EQ(period, 0.001);
    }
}

TEST(CpuBudget, WithinTheLimitNothingIsStretched) {
    for (const double period : run(0.005, 10 * kMillisecond, 60, always(0.04)).period) {
        ASSERT_EQ(period, 0.010);
    }
}

TEST(CpuBudget, NeverFasterThanAskedFor) {
    const Ticks ticks = run(0.01, 500 * kMillisecond, 60, always(1));
    for (const double period : ticks.period) ASSERT_EQ(period, 0.5);
}

TEST(CpuBudget, FindsThePeriodAndKeepsIt) {
    // 0.2 ms every 40 ms is 0.5 %.
    const Ticks ticks = run(0.005, kMillisecond, 30, always(0.2));
    expect_bound(ticks, 0.005);
    bool settled = false;
    for (std::size_t i = 1; i < ticks.at.size(); ++i) {
        // From one side: it never goes back, which is what swinging would be.
        ASSERT_GE(ticks.period[i], ticks.period[i - 1] * (1 - 1e-6));
        if (ticks.at[i] < 3) continue;
        ASSERT_NEAR(ticks.period[i], 0.040, 0.0004);
        settled = true;
    }
    EXPECT_TRUE(settled);
    EXPECT_NEAR(ticks.spent_between(3, 30), 27 * 0.005, 0.001);
}

TEST(CpuBudget, FindsItWhereALongerPeriodMakesTicksDearer) {
    // With more time between two ticks more of 400 threads have run since.
    const Cost cost = [](double, double period) {
        return 1e6 + 3e6 * (1 - std::exp(-period / 50e6));
    };
    const Ticks ticks = run(0.02, kMillisecond, 40, cost);
    expect_bound(ticks, 0.02);
    EXPECT_NEAR(ticks.spent_between(10, 40), 30 * 0.02, 30 * 0.02 * 0.03);
    for (std::size_t i = 1; i < ticks.at.size(); ++i) {
        if (ticks.at[i] > 10) {
            ASSERT_NEAR(ticks.period[i], ticks.period[i - 1], 0.01 * ticks.period[i]);
        }
    }
}

TEST(CpuBudget, HoldsOnAverageWhateverSingleTicksCost) {
    std::mt19937 random(1);
    std::lognormal_distribution<double> factor(0, 1);  // one in a hundred costs ten times as much
    const Cost cost = [&](double, double) { return 0.2e6 * factor(random); };
    const Ticks ticks = run(0.005, kMillisecond, 300, cost);
    expect_bound(ticks, 0.005);
    EXPECT_LE(ticks.spent_between(0, 300), 300 * 0.005 + 0.005 + ticks.most_expensive());
    EXPECT_GE(ticks.spent_between(0, 300), 300 * 0.005 * 0.8) << "and uses what it may";
}

TEST(CpuBudget, ABurstIsPaidForAtOnce) {
    // All quiet, then 3 ms a tick at 1 kHz: the mean alone would take eight ticks to see it.
    const Cost cost = [](double now, double) { return now < 20 ? 0.002e6 : 3e6; };
    const Ticks ticks = run(0.01, kMillisecond, 60, cost);
    EXPECT_EQ(ticks.period_at(19.9), 0.001);
    EXPECT_LE(ticks.spent_between(20, 23), 3 * 0.01 + 0.01 + 0.003 + 1e-6)
        << "a quiet time before it is not saved up";
    EXPECT_NEAR(ticks.period_at(59), 0.3, 0.003);
}

TEST(CpuBudget, RecoversWithinSeconds) {
    const Cost cost = [](double now, double) { return now < 30 ? 4e6 : 0.002e6; };
    const Ticks ticks = run(0.005, kMillisecond, 60, cost);
    EXPECT_NEAR(ticks.period_at(29), 0.8, 0.008);
    EXPECT_EQ(ticks.period_at(36), 0.001);
}

TEST(CpuBudget, WhatCannotBeHeldEndsAtOneTickASecond) {
    const Cost cost = [](double now, double) { return now < 100 ? 50e6 : 0.002e6; };
    const Ticks ticks = run(0.005, kMillisecond, 120, cost);
    EXPECT_EQ(ticks.period_at(99), 1.0);
    EXPECT_GT(ticks.spent_between(0, 100), 100 * 0.005);
    EXPECT_EQ(ticks.period_at(112), 0.001) << "a hundred seconds of debt are not paid for";
}

TEST(CpuBudget, ASuspendedProcessOwesNothing) {
    CpuBudget budget;
    budget.begin(0.005, kMillisecond, 0, 0);
    std::uint64_t now = 0, cpu = 0, period = kMillisecond;
    for (int i = 0; i < 100; ++i) {
        now += period;
        cpu += 4 * kMillisecond;
        period = budget.next_period(now, cpu);
    }
    EXPECT_GT(period, 500 * kMillisecond);
    now += 3600ull * 1'000'000'000;
    EXPECT_EQ(budget.next_period(now, cpu + 2'000), kMillisecond);
}

}  // namespace
}  // namespace otel_proflink::test
