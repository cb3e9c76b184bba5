// SPDX-License-Identifier: Apache-2.0
#include "context.hpp"

#include <gtest/gtest.h>

#include "local_memory.hpp"

namespace otel_proflink::test {
namespace {

constexpr std::uint8_t kTrace[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr std::uint8_t kSpan[8] = {21, 22, 23, 24, 25, 26, 27, 28};
constexpr std::uint8_t kRoot[8] = {31, 32, 33, 34, 35, 36, 37, 38};

struct Pair {
    std::uintptr_t key;
    std::uintptr_t value;
};

class ContextRead : public testing::Test {
  protected:
    ContextRead() { record = link_new(kTrace, kSpan, kRoot, 1, 0, 0); }
    ~ContextRead() override {
        if (record != nullptr) link_free(record);
    }

    std::uintptr_t value(std::uint64_t serial, std::uintptr_t type = kValueType) {
        const std::uintptr_t at = memory.allocate(48);
        memory.put(at + kTypeAt, type);
        memory.put(at + value_at::record, reinterpret_cast<std::uintptr_t>(record));
        memory.put(at + value_at::serial, serial);
        return at;
    }
    std::uintptr_t value() { return value(record->serial); }

    std::uintptr_t bitmap_at(std::uintptr_t at, std::uint32_t bits,
                             const std::vector<Pair>& pairs) {
        memory.put(at + kTypeAt, kBitmapType);
        memory.put(at + node_at::bits, bits);
        for (std::size_t i = 0; i < pairs.size(); ++i) {
            memory.put(at + node_at::pairs + 16 * i, pairs[i]);
        }
        return at;
    }
    std::uintptr_t bitmap(std::uint32_t bits, const std::vector<Pair>& pairs) {
        return bitmap_at(memory.allocate(32 + 16 * pairs.size()), bits, pairs);
    }
    std::uintptr_t array(std::uint32_t index, std::uintptr_t child) {
        const std::uintptr_t at = memory.allocate(16 + 32 * 8);
        memory.put(at + kTypeAt, kArrayType);
        if (child != 0) memory.put(at + node_at::children + 8 * index, child);
        return at;
    }
    std::uintptr_t collision(const std::vector<Pair>& pairs) {
        const std::uintptr_t at = memory.allocate(32 + 16 * pairs.size());
        memory.put(at + kTypeAt, kCollisionType);
        memory.put<std::uint64_t>(at + node_at::collision_size, 2 * pairs.size());
        for (std::size_t i = 0; i < pairs.size(); ++i) {
            memory.put(at + node_at::pairs + 16 * i, pairs[i]);
        }
        return at;
    }
    Label read(std::uintptr_t root) {
        const std::uintptr_t hamt = memory.allocate(24);
        memory.put(hamt + context_at::hamt_root, root);
        return read_label(memory, abi, key, kContext, hamt, &source);
    }
    void expect_linked(const Label& label) {
        ASSERT_EQ(label.state, LabelState::linked);
        EXPECT_EQ(label.serial, record->serial);
        EXPECT_EQ(std::memcmp(label.link.trace_id, kTrace, 16), 0);
        EXPECT_EQ(std::memcmp(label.link.span_id, kSpan, 8), 0);
        EXPECT_EQ(std::memcmp(label.link.local_root_span_id, kRoot, 8), 0);
    }

    static constexpr std::uintptr_t kContext = 0x1000;  // never read here
    static constexpr std::uint32_t kBit = 1u << (kVariableHash & 31u);
    static constexpr std::uint32_t kBit2 = 1u << (kVariableHash >> 5 & 31u);

    LocalMemory memory;
    ProflinkAbi abi = make_abi(Layout::py312);
    ContextKey key = make_key();
    LinkRecord* record;
    LabelSource source;
};

// --- The task that handed work over

class TaskRead : public ContextRead {
  protected:
    static constexpr std::uintptr_t kTaskVariable = 0x7700, kTaskType = 0x8800;
    static constexpr std::uint32_t kTaskHash = kVariableHash + 1;  // the next place of the node
    static constexpr std::uint32_t kTaskBit = 1u << (kTaskHash & 31u);

    TaskRead() {
        key.task = {kTaskVariable, kTaskHash, kTaskType};
        key.task_offset = 16;
        key.tasks = true;
    }
    std::uintptr_t mark(std::uint64_t number, std::uintptr_t type = kTaskType) {
        const std::uintptr_t at = memory.allocate(24);
        memory.put(at + kTypeAt, type);
        memory.put(at + 16, number);
        return at;
    }
    std::uintptr_t both(std::uintptr_t task_mark) {
        return bitmap(kBit | kTaskBit, {{kVariable, value()}, {kTaskVariable, task_mark}});
    }
};

TEST_F(TaskRead, BesideTheLink) {
    const std::uintptr_t at = mark(4711);
    const Label label = read(both(at));
    expect_linked(label);
    EXPECT_EQ(label.task, 4711u);
    EXPECT_EQ(source.task.pair[1], at) << "to be read again";
}

TEST_F(TaskRead, OfWorkWithoutASpan) {
    const std::uintptr_t empty = memory.allocate(48);
    memory.put(empty + kTypeAt, kValueType);
    const Label label =
        read(bitmap(kBit | kTaskBit, {{kVariable, empty}, {kTaskVariable, mark(5)}}));
    EXPECT_EQ(label.state, LabelState::none);
    EXPECT_EQ(label.task, 5u);
}

TEST_F(TaskRead, NoneIsOrdinary) {
    const Label label = read(bitmap(kBit, {{kVariable, value()}}));
    expect_linked(label);
    EXPECT_EQ(label.task, 0u);
}

TEST_F(TaskRead, NotLookedUpBeforeThereAreTasks) {
    key.tasks = false;
    const Label label = read(both(mark(4711)));
    expect_linked(label);
    EXPECT_EQ(label.task, 0u);
}

TEST_F(TaskRead, SomethingElseUnderTheKeyIsNoProof) {
    EXPECT_EQ(read(both(mark(1, kValueType))).state, LabelState::unknown);
    EXPECT_EQ(read(both(memory.end())).state, LabelState::unknown);
}

TEST_F(ContextRead, NoContextYet) {
    EXPECT_EQ(read_label(memory, abi, key, 0, 0, &source).state, LabelState::none);
    EXPECT_EQ(memory.calls, 0u);
}

TEST_F(ContextRead, Bitmap) {
    expect_linked(read(bitmap(kBit, {{kVariable, value()}})));
    // Found by the number of set bits below its own.
    expect_linked(read(bitmap(kBit | 1u | 2u, {{1, 2}, {3, 4}, {kVariable, value()}})));
    expect_linked(read(bitmap(kBit | 1u << 31, {{kVariable, value()}, {3, 4}})));
}

// Pairs that are not read with the node's head.
TEST_F(ContextRead, BitmapWithManyPairs) {
    key.folded_hash = 30;
    std::vector<Pair> pairs(11, Pair{0x10, 0x20});
    pairs[10] = {kVariable, value()};
    expect_linked(read(bitmap(0x3ffu | 1u << 30, pairs)));
    pairs[10].key = kOtherVariable;
    EXPECT_EQ(read(bitmap(0x3ffu | 1u << 30, pairs)).state, LabelState::none);
}

TEST_F(ContextRead, NodeAtTheEndOfAPage) {
    expect_linked(read(bitmap_at(memory.at_end(48), kBit, {{kVariable, value()}})));
    // Its pair lies beyond.
    EXPECT_EQ(read(bitmap_at(memory.at_end(32), kBit, {})).state, LabelState::unknown);
}

TEST_F(ContextRead, Array) {
    const std::uintptr_t leaf = bitmap(kBit2, {{kVariable, value()}});
    expect_linked(read(array(kVariableHash & 31u, leaf)));
    EXPECT_EQ(read(array((kVariableHash & 31u) + 1, leaf)).state, LabelState::none);
}

TEST_F(ContextRead, Nested) {
    const std::uintptr_t inner =
        bitmap(kBit2 | 1u << 2, {{kVariable, value()}, {kOtherVariable, 0x10}});
    expect_linked(read(bitmap(kBit, {{0, inner}})));
}

// Hashes that agree in all 32 bits: seven levels of nodes, then a collision node.
TEST_F(ContextRead, DeepestCollision) {
    std::uintptr_t node = collision({{kOtherVariable, 0x10}, {kVariable, value()}});
    for (int level = 6; level >= 0; --level) {
        const std::uint32_t index = kVariableHash >> (5 * level) & 31u;
        node = level % 2 == 0 ? bitmap(1u << index, {{0, node}}) : array(index, node);
    }
    expect_linked(read(node));
}

TEST_F(ContextRead, CollisionWithoutOurs) {
    EXPECT_EQ(read(collision({{kOtherVariable, 0x10}, {0x50, 0x60}})).state, LabelState::none);
}

TEST_F(ContextRead, CollisionSizesThatCannotBe) {
    const std::uintptr_t node = collision({{kVariable, value()}, {0x50, 0x60}});
    expect_linked(read(node));
    for (const std::uint64_t size : {std::uint64_t{3}, std::uint64_t{130}, ~std::uint64_t{1}}) {
        memory.put(node + node_at::collision_size, size);
        EXPECT_EQ(read(node).state, LabelState::unknown) << size;
    }
}

TEST_F(ContextRead, Absent) {
    EXPECT_EQ(read(bitmap(0, {})).state, LabelState::none);
    EXPECT_EQ(read(bitmap(kBit << 1, {{kVariable, value()}})).state, LabelState::none);
    // The same bits, another variable.
    EXPECT_EQ(read(bitmap(kBit, {{kOtherVariable, value()}})).state, LabelState::none);
}

TEST_F(ContextRead, TooDeep) {
    const std::uintptr_t loop = array(0, 0);
    for (std::uint32_t i = 0; i < 32; ++i) memory.put(loop + node_at::children + 8 * i, loop);
    EXPECT_EQ(read(loop).state, LabelState::unknown);
}

TEST_F(ContextRead, NoNodeWhereOneMustBe) {
    EXPECT_EQ(read(0).state, LabelState::unknown);
    EXPECT_EQ(read(bitmap(kBit, {{0, 0}})).state, LabelState::unknown);
    EXPECT_EQ(read(memory.end()).state, LabelState::unknown);
    EXPECT_EQ(read_label(memory, abi, key, kContext, 0, &source).state, LabelState::unknown);
    EXPECT_EQ(read_label(memory, abi, key, kContext, memory.end(), &source).state,
              LabelState::unknown);
}

TEST_F(ContextRead, NotAValueOfOurs) {
    EXPECT_EQ(read(bitmap(kBit, {{kVariable, value(record->serial, kContextType)}})).state,
              LabelState::unknown);
    EXPECT_EQ(read(bitmap(kBit, {{kVariable, memory.end()}})).state, LabelState::unknown);
}

TEST_F(ContextRead, ValueWithoutASpan) {
    const std::uintptr_t at = value();
    memory.put(at + value_at::record, std::uintptr_t{0});
    EXPECT_EQ(read(bitmap(kBit, {{kVariable, at}})).state, LabelState::none);
}

TEST_F(ContextRead, StaleLink) {
    const std::uintptr_t root = bitmap(kBit, {{kVariable, value()}});
    expect_linked(read(root));
    link_free(record);
    EXPECT_EQ(read(root).state, LabelState::unknown);
    // Taken again, it is another span's.
    LinkRecord* again = link_new(kTrace, kRoot, kRoot, 0, 0, 0);
    EXPECT_EQ(again, record);
    EXPECT_EQ(read(root).state, LabelState::unknown);
    record = again;
}

TEST_F(ContextRead, SerialOfAnother) {
    EXPECT_EQ(read(bitmap(kBit, {{kVariable, value(record->serial + 1)}})).state,
              LabelState::unknown);
    EXPECT_EQ(read(bitmap(kBit, {{kVariable, value(0)}})).state, LabelState::unknown);
}

TEST_F(ContextRead, RootType) {
    const std::uintptr_t hamt = memory.allocate(24);
    const std::uintptr_t context = memory.allocate(32);
    EXPECT_EQ(hamt_root_type(memory, abi, context), 0u);
    memory.put(context + context_at::vars, hamt);
    EXPECT_EQ(hamt_root_type(memory, abi, context), 0u);
    memory.put(hamt + context_at::hamt_root, array(0, 0));
    EXPECT_EQ(hamt_root_type(memory, abi, context), kArrayType);
    EXPECT_EQ(hamt_root_type(memory, abi, memory.end()), 0u);
}

// CPython's hamt_hash: halves xored, and never -1.
TEST(ContextKeys, FoldHash) {
    EXPECT_EQ(fold_hash(0x1234), 0x1234u);
    EXPECT_EQ(fold_hash(0x0000000f000000f0), 0xffu);
    EXPECT_EQ(fold_hash(static_cast<std::ptrdiff_t>(0xffffffff00000000u)), 0xfffffffeu);
    EXPECT_EQ(fold_hash(-1), 0u);
}

}  // namespace
}  // namespace otel_proflink::test
