// SPDX-License-Identifier: Apache-2.0
//
// The snapshot driven through a memory that changes between any two reads, words of one read
// included. Every result must have been true at one instant while it was taken.
#include <gtest/gtest.h>

#include <cstdio>
#include <random>

#include "support/effort.hpp"
#include "support/scenarios.hpp"
#include "support/snapshot_checker.hpp"

namespace otel_proflink::test {
namespace {

using Grain = MovingMemory::Grain;

constexpr Layout kLayouts[] = {Layout::py311, Layout::py312, Layout::py313};

class Snapshot : public testing::TestWithParam<std::tuple<Layout, int>> {
  protected:
    Layout layout() const { return std::get<0>(GetParam()); }
    const Scenario& scenario() const {
        return scenarios()[static_cast<std::size_t>(std::get<1>(GetParam()))];
    }
    void report(const char* what, const Tally& tally) const {
        std::printf("  %s: %s\n", what, tally.text().c_str());
    }
};

TEST_P(Snapshot, StandsStill) {
    Model model(layout(), {});
    scenario().build(model);
    SnapshotChecker checker(model);
    Tally tally;
    for (std::uint32_t i = 0; i < 3 * model.length(); ++i) {
        checker.take(Grain::word, nullptr, 0, 1, &tally);
    }
    report("still", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.ok, tally.snapshots / 2);
}

TEST_P(Snapshot, OneMove) {
    Model model(layout(), {});
    scenario().build(model);
    SnapshotChecker checker(model);
    const Tally tally = checker.one_move(Grain::word, static_cast<std::uint32_t>(scaled(16)));
    report("one move", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 50);
}

// There and back: what the first move changes, the second may restore.
TEST_P(Snapshot, TwoMoves) {
    Model model(layout(), {});
    scenario().build(model);
    SnapshotChecker checker(model);
    const Tally tally = checker.two_moves(Grain::request, {1, 2, 3, 5, 8, 13, 21, 34, 55, 89},
                                          scaled(200'000));
    report("two moves", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 50);
}

INSTANTIATE_TEST_SUITE_P(
    All, Snapshot,
    testing::Combine(testing::ValuesIn(kLayouts),
                     testing::Range(0, static_cast<int>(scenarios().size()))),
    [](const auto& parameter) {
        return std::string(name_of(std::get<0>(parameter.param))) + "_" +
               scenarios()[static_cast<std::size_t>(std::get<1>(parameter.param))].name;
    });

class Storm : public testing::TestWithParam<Layout> {};

TEST_P(Storm, RandomPrograms) {
    Tally tally;
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
        Model model(GetParam(), {});
        build_random(model, seed, 300);
        SnapshotChecker checker(model);
        tally.add(checker.storm(seed, 4, scaled(60'000)));
    }
    std::printf("  %s\n", tally.text().c_str());
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 50);
}

INSTANTIATE_TEST_SUITE_P(All, Storm, testing::ValuesIn(kLayouts), [](const auto& parameter) {
    return std::string(name_of(parameter.param));
});

}  // namespace
}  // namespace otel_proflink::test
