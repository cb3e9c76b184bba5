// SPDX-License-Identifier: Apache-2.0
//
// The snapshot driven through a memory that changes between any two reads, words of one read
// included. Every result must have been true at one instant while it was taken.
#include <gtest/gtest.h>

#include <cstdio>
#include <stdexcept>
#include <thread>
#include <utility>

#include "support/effort.hpp"
#include "support/scenarios.hpp"
#include "support/snapshot_checker.hpp"
#include "support/static_thread.hpp"

namespace otel_proflink::test {
namespace {

using Grain = MovingMemory::Grain;

constexpr Layout kLayouts[] = {Layout::py311, Layout::py312, Layout::py313};

// How far the model goes at a point: from one store to a few calls. PROFLINK_TEST_EFFORT=10 and
// above tries every number up to 100.
// Below half of the usual effort not every point is tried.
std::uint64_t one_move_budget() { return effort() < 0.5 ? scaled(400'000) : ~std::uint64_t{0}; }

std::vector<std::uint32_t> step_counts(std::uint32_t most) {
    std::vector<std::uint32_t> counts;
    if (effort() >= 10) {
        for (std::uint32_t n = 1; n <= 100; ++n) counts.push_back(n);
        return counts;
    }
    std::uint32_t a = 1;
    for (std::uint32_t b = 2; a <= most; b += std::exchange(a, b)) counts.push_back(a);
    return counts;
}

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
    const Tally tally = checker.one_move(Grain::word, step_counts(34), one_move_budget());
    report("one move", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 100);
}

// There and back: what the first move changes, the second may restore. Two moves within one batch
// of reads, which is one system call, are left to the calls themselves: the word grain's turn.
TEST_P(Snapshot, TwoMoves) {
    Model model(layout(), {});
    scenario().build(model);
    SnapshotChecker checker(model);
    const std::vector<std::uint32_t> steps = step_counts(89);
    Tally tally = checker.two_moves(Grain::request, steps, scaled(100'000));
    tally.add(checker.two_moves(Grain::word, steps, scaled(100'000)));
    report("two moves", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 100);
}

// 3.11 and 3.12 show an uninitialised frame pointer for a few instructions of each call from C.
TEST_P(Snapshot, UnsetCframe) {
    if (!has_cframe(layout())) GTEST_SKIP() << "no _PyCFrame";
    Model model(layout(), {.unset_cframe = true});
    scenario().build(model);
    SnapshotChecker checker(model);
    Tally tally;
    for (std::uint32_t i = 0; i < 3 * model.length(); ++i) {
        checker.take(Grain::word, nullptr, 0, 1, &tally);
    }
    tally.add(checker.one_move(Grain::word, step_counts(5), one_move_budget()));
    report("unset cframe", tally);
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 100);
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
        Model model(GetParam(), {.unset_cframe = seed % 2 == 0});
        build_random(model, seed, 300);
        SnapshotChecker checker(model);
        tally.add(checker.storm(seed, 4, scaled(60'000)));
    }
    std::printf("  %s\n", tally.text().c_str());
    EXPECT_EQ(tally.wrong(), 0u);
    EXPECT_GT(tally.moved_ok, tally.moved / 100);
}

INSTANTIATE_TEST_SUITE_P(All, Storm, testing::ValuesIn(kLayouts), [](const auto& parameter) {
    return std::string(name_of(parameter.param));
});

// --- The test can fail: without what a proof rests on, the same moves give wrong results.

const Scenario& scenario_named(const std::string& name) {
    for (const Scenario& scenario : scenarios()) {
        if (scenario.name == name) return scenario;
    }
    throw std::invalid_argument(name);
}

class Mutant : public testing::TestWithParam<Layout> {
  protected:
    std::uint64_t wrong_labels(const char* scenario, SnapshotChecker::Mutation mutation,
                               Model::Options options = {}) {
        Model model(GetParam(), options);
        scenario_named(scenario).build(model);
        SnapshotChecker checker(model, mutation);
        Tally tally = checker.one_move(Grain::word, step_counts(8), one_move_budget());
        tally.add(checker.two_moves(Grain::request, step_counts(89), scaled(200'000)));
        std::printf("  %s: %s\n", scenario, tally.text().c_str());
        return tally.wrong_label;
    }
};

TEST_P(Mutant, CountersThatNeverMove) {
    EXPECT_GT(wrong_labels("spans", {}, {.slots_never_move = true}), 0u);
}

TEST_P(Mutant, CountersOfAnotherThread) {
    EXPECT_GT(wrong_labels("nested", {.slot_elsewhere = true}), 0u);
}

TEST_P(Mutant, VersionThatIsAlwaysZero) {
    EXPECT_GT(wrong_labels("context_run", {.version_is_zero = true}), 0u);
}

TEST_P(Mutant, VersionThatNeverMoves) {
    EXPECT_GT(wrong_labels("tasks", {}, {.versions_never_move = true}), 0u);
}

// Why CodeTable has to be told of dead code objects.
TEST_P(Mutant, CodeObjectsThatDieUnseen) {
    EXPECT_GT(wrong_labels("code_objects", {.no_code_watcher = true}), 0u);
}

INSTANTIATE_TEST_SUITE_P(All, Mutant, testing::ValuesIn(kLayouts), [](const auto& parameter) {
    return std::string(name_of(parameter.param));
});

// --- One rule at a time

class SnapshotRules : public testing::Test {
  protected:
    SnapshotRules() : t(Layout::py313) {
        t.chunk(256);
        t.enter();
        t.call(t.code(1));
    }
    ~SnapshotRules() override {
        for (LinkRecord* record : records) link_free(record);
    }

    // Puts a link in the thread's context, as an attach in the middle would.
    LinkRecord* attach() {
        const std::uint8_t id[16] = {static_cast<std::uint8_t>(records.size() + 1)};
        LinkRecord* record = link_new(id, id, id, 0, 0, 0);
        records.push_back(record);
        std::uint64_t* value = t.memory.allocate(8);
        put(value, kTypeAt, kValueType);
        put(value, value_at::record, record);
        put(value, value_at::serial, record->serial.load());
        std::uint64_t* node = t.memory.allocate(16);
        put(node, kTypeAt, kBitmapType);
        put(node, node_at::bits, 1u << (kVariableHash & 31));
        put(node, node_at::pairs, kVariable);
        put(node, node_at::pairs + 8, value);
        std::uint64_t* hamt = t.memory.allocate(8);
        put(hamt, context_at::hamt_root, node);
        if (context == nullptr) {
            context = t.memory.allocate(8);
            put(t.tstate, tstate_at::context, context);
        }
        put(context, context_at::vars, hamt);
        return record;
    }

    SnapshotResult take(const ThreadKey& key) {
        return t.snapshotter().take(key, &t.cache, t.chain.get(), nullptr);
    }
    SnapshotResult settle(const ThreadKey& key) {
        SnapshotResult result = SnapshotResult::torn;
        for (int i = 0; i < 3 && result == SnapshotResult::torn; ++i) result = take(key);
        return result;
    }

    StaticThread t;
    std::uint64_t* context = nullptr;
    std::vector<LinkRecord*> records;
};

TEST_F(SnapshotRules, AnotherThreadStateIsGone) {
    ASSERT_EQ(t.take(), SnapshotResult::ok);
    ThreadKey key = t.thread();
    key.id += 1;
    EXPECT_EQ(take(key), SnapshotResult::gone);
    key = t.thread();
    key.tid += 1;
    t.slot.tid.store(key.tid);
    EXPECT_EQ(take(key), SnapshotResult::gone);
    t.slot.tid.store(4711);
    put(t.tstate, tstate_at::interp, kInterpreter + 16);
    EXPECT_EQ(take(t.thread()), SnapshotResult::gone);
}

TEST_F(SnapshotRules, NothingIsReadWhileAnAttachIsUnderWay) {
    ASSERT_EQ(t.take(), SnapshotResult::ok);
    attach_begin(&t.slot);
    const std::uint64_t calls = t.memory.calls();
    EXPECT_EQ(take(t.thread()), SnapshotResult::torn);
    EXPECT_EQ(t.memory.calls(), calls);
    attach_begin(&t.slot);  // a finaliser attaches inside it
    attach_done(&t.slot);
    EXPECT_EQ(take(t.thread()), SnapshotResult::torn);
    attach_done(&t.slot);
    EXPECT_EQ(settle(t.thread()), SnapshotResult::ok);
}

TEST_F(SnapshotRules, AProvenLabelIsNotReadAgain) {
    attach();
    ASSERT_EQ(t.take(), SnapshotResult::ok);
    ASSERT_EQ(t.cache.label.state, LabelState::linked);
    t.memory.hide(context, 64);
    EXPECT_EQ(take(t.thread()), SnapshotResult::ok);
    EXPECT_EQ(t.cache.label.state, LabelState::linked);
    attach_begin(&t.slot);
    attach_done(&t.slot);
    EXPECT_EQ(take(t.thread()), SnapshotResult::torn);
}

TEST_F(SnapshotRules, EachAttachIsSeen) {
    for (int i = 0; i < 3; ++i) {
        attach_begin(&t.slot);
        const LinkRecord* record = attach();
        attach_done(&t.slot);
        ASSERT_EQ(t.take(), SnapshotResult::ok);
        EXPECT_EQ(t.cache.label.serial, record->serial.load());
    }
}

// A thread without a slot has attached nothing, for as long as no slot was handed out.
TEST_F(SnapshotRules, WithoutASlotNewSlotsAreDistrusted) {
    ThreadKey key = t.thread();
    key.slot = nullptr;
    key.assigned = attach_slots_assigned();
    ASSERT_EQ(settle(key), SnapshotResult::ok);
    std::thread([] { attach_slot(); }).join();
    EXPECT_EQ(take(key), SnapshotResult::torn);
    key.assigned = attach_slots_assigned();
    EXPECT_EQ(settle(key), SnapshotResult::ok);
}

// Slots handed out and attaches of a thread are both small numbers: one is not the other.
TEST_F(SnapshotRules, LabelReadWithoutASlotDoesNotOutliveIt) {
    std::thread([] { attach_slot(); }).join();
    ThreadKey key = t.thread();
    key.slot = nullptr;
    key.assigned = attach_slots_assigned();
    const LinkRecord* inherited = attach();  // by a context that was copied elsewhere
    ASSERT_EQ(settle(key), SnapshotResult::ok);
    ASSERT_EQ(t.cache.label.serial, inherited->serial.load());
    const LinkRecord* own = nullptr;
    while (t.slot.begun.load() != key.assigned) {
        attach_begin(&t.slot);
        own = attach();
        attach_done(&t.slot);
    }
    ASSERT_NE(own, nullptr);
    ASSERT_EQ(t.take(), SnapshotResult::ok);
    EXPECT_EQ(t.cache.label.serial, own->serial.load());
}

// A thread's slot goes to another thread when it ends; code that runs later still, in another
// library's thread-exit handler, gets the thread a new one.
TEST_F(SnapshotRules, ASlotThatChangedHandsProvesNothing) {
    attach();
    ASSERT_EQ(t.take(), SnapshotResult::ok);
    t.slot.tid.store(99);
    EXPECT_EQ(take(t.thread()), SnapshotResult::torn);
    t.slot.tid.store(0);
    EXPECT_EQ(take(t.thread()), SnapshotResult::torn);
}

class Refusing final : public FrameVisitor {
  public:
    bool visit(const Chain&) noexcept override { return false; }
};

TEST_F(SnapshotRules, AVisitorMayRefuse) {
    Refusing refusing;
    EXPECT_EQ(t.take(&refusing), SnapshotResult::torn);
}

}  // namespace
}  // namespace otel_proflink::test
