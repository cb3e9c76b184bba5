// SPDX-License-Identifier: Apache-2.0
//
// Which chains are followed, how far, and which are refused.
#include <gtest/gtest.h>

#include <functional>

#include "support/static_thread.hpp"

namespace otel_proflink::test {
namespace {

class Walk : public testing::TestWithParam<Layout> {
  protected:
    // One thread with its first chunk, entered from C.
    static std::unique_ptr<StaticThread> start(Layout layout, std::size_t chunk_words = 2040) {
        auto t = std::make_unique<StaticThread>(layout);
        t->chunk(chunk_words);
        t->enter();
        return t;
    }
    std::unique_ptr<StaticThread> start() { return start(GetParam()); }

    // `depth` frames of one code object each, in chunks as CPython makes them.
    std::unique_ptr<StaticThread> deep(std::uint32_t depth) {
        auto t = std::make_unique<StaticThread>(GetParam(), (depth + 64) * 8 + (1u << 14));
        codes_.clear();
        code_block_ = t->memory.allocate(2);
        for (std::uint32_t i = 0; i < depth; ++i) {
            if (i % 300 == 0) t->chunk(300 * 6 + 8);
            if (i == 0) t->enter();
            // Addresses as names: the walker does not look at code objects.
            const std::uintptr_t code = 0x10000 + 16 * i;
            codes_.push_back(code);
            std::uint64_t* frame = t->call(reinterpret_cast<void*>(code));
            if (i == 0) outermost_ = frame;
        }
        return t;
    }

    std::vector<std::uintptr_t> codes_;  // outermost first
    std::uint64_t* code_block_ = nullptr;
    std::uint64_t* outermost_ = nullptr;
};

TEST_P(Walk, LeafFirst) {
    auto t = start();
    std::uint64_t* a = t->code(1);
    std::uint64_t* b = t->code(2);
    t->call(a);
    t->call(b);
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    ASSERT_EQ(t->chain->count, 2u);
    EXPECT_EQ(t->chain->omitted, 0u);
    EXPECT_EQ(t->chain->frames[0].code, reinterpret_cast<std::uintptr_t>(b));
    EXPECT_EQ(t->chain->frames[1].code, reinterpret_cast<std::uintptr_t>(a));
    EXPECT_EQ(t->chain->frames[1].instruction, reinterpret_cast<std::uintptr_t>(a) + code_at::size);
}

TEST_P(Walk, ThreadWithoutFrames) {
    StaticThread t(GetParam());
    EXPECT_EQ(t.take(), SnapshotResult::no_frames);
    EXPECT_EQ(t.chain->count, 0u);
}

TEST_P(Walk, DeepStacksKeepBothEnds) {
    for (const std::uint32_t depth :
         {1u, 299u, 301u, kMaxFrames - 1, kMaxFrames, kMaxFrames + 1, kMaxFrames + 511,
          kMaxFrames + 512, kMaxFrames + 513, 3000u, 5000u}) {
        auto t = deep(depth);
        ASSERT_EQ(t->take(), SnapshotResult::ok) << depth;
        const std::uint32_t kept = std::min(depth, kMaxFrames);
        ASSERT_EQ(t->chain->count, kept);
        ASSERT_EQ(t->chain->omitted, depth - kept);
        for (std::uint32_t i = 0; i < kept; ++i) {
            const bool near_leaf = i < kMaxFrames / 2 || depth <= kMaxFrames;
            const std::uint32_t from_root = near_leaf ? depth - 1 - i : kept - 1 - i;
            ASSERT_EQ(t->chain->frames[i].code, codes_[from_root]) << depth << " frame " << i;
        }
    }
}

TEST_P(Walk, DeepStacksAreReadInWindows) {
    auto t = deep(2000);
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    EXPECT_LT(t->memory.calls(), 80u);
}

// While some part of it is read, the thread returns from all of a recursion, calls something else,
// and goes down again by the same frames: the memory of those that it left is as it was.
TEST_P(Walk, CallersAreThoseOfTheFramesThatAreSeen) {
    constexpr std::uintptr_t kElse = 0xbad0;
    for (const std::uint32_t depth : {250u, 800u, 2000u, 5000u}) {
        for (std::uint64_t at = 1;; ++at) {
            auto t = deep(depth);
            const std::uintptr_t code = codes_[0];
            std::uint64_t call = 0;
            bool seen = false;
            t->memory.before_read = [&](const ReadRequest* requests, int count) {
                // Where the thread's leaf is read as well, it would show that it is elsewhere.
                bool leaf = false;
                for (int i = 0; i < count; ++i) {
                    leaf |= requests[i].address - reinterpret_cast<std::uintptr_t>(t->tstate) <
                            tstate_at::size;
                }
                const bool away = ++call == at && !leaf;
                seen |= away;
                put(outermost_, frame_at::code, away ? kElse : code);
            };
            const SnapshotResult result = t->take();
            if (call < at) break;
            if (!seen || result != SnapshotResult::ok) continue;
            for (std::uint32_t i = 0; i < t->chain->count; ++i) {
                ASSERT_NE(t->chain->frames[i].code, kElse) << "depth " << depth << ", read " << at;
            }
        }
    }
}

TEST_P(Walk, GeneratorsAndShimsInBetween) {
    auto t = start();
    std::uint64_t* codes[6];
    for (std::uint32_t i = 0; i < 6; ++i) codes[i] = t->code(i);
    t->call(codes[0]);
    t->generator(codes[1]);
    t->call(codes[2]);
    t->enter();
    t->generator(codes[3]);
    t->generator(codes[4]);
    t->call(codes[5]);
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    ASSERT_EQ(t->chain->count, 6u);
    for (std::uint32_t i = 0; i < 6; ++i) {
        EXPECT_EQ(t->chain->frames[i].code, reinterpret_cast<std::uintptr_t>(codes[5 - i]));
    }
}

TEST_P(Walk, MoreGeneratorsThanAreRemembered) {
    auto t = start();
    std::uint64_t* code = t->code(1);
    t->call(code);
    for (int i = 0; i < 100; ++i) t->generator(code);
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    EXPECT_EQ(t->chain->count, 101u);
}

TEST_P(Walk, FrameOfALargeFunctionInItsOwnChunk) {
    auto t = start();
    std::uint64_t* a = t->code(1);
    t->call(a);
    t->chunk(8000);  // a frame that no ordinary chunk holds
    std::uint64_t* b = t->code(2);
    t->call(b, 7000);
    std::uint64_t* c = t->code(3);
    t->call(c);
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    ASSERT_EQ(t->chain->count, 3u);
    EXPECT_EQ(t->chain->frames[1].code, reinterpret_cast<std::uintptr_t>(b));
}

// CPython frees a chunk with its first frame; the next one may get the address and another size.
TEST_P(Walk, ChunkOfAnotherSizeAtTheSameAddress) {
    for (const bool grows : {true, false}) {
        auto t = start(GetParam(), 64);
        t->call(t->code(1));
        t->chunk(512);
        std::uint64_t* chunk = reinterpret_cast<std::uint64_t*>(t->tstate[tstate_at::chunk / 8]);
        const std::uint64_t sizes[2] = {96 * 8, 500 * 8};
        put(chunk, chunk_at::size, sizes[grows ? 0 : 1]);
        for (int i = 0; i < 10; ++i) t->call(t->code(2));
        ASSERT_EQ(t->take(), SnapshotResult::ok);
        const std::uint64_t now = sizes[grows ? 1 : 0];
        put(chunk, chunk_at::size, now);
        if (grows) {
            for (int i = 0; i < 40; ++i) t->call(t->code(3));
        } else {
            t->memory.hide(chunk + now / 8, 4096);
        }
        EXPECT_EQ(t->take(), SnapshotResult::ok) << (grows ? "grows" : "shrinks");
        EXPECT_EQ(t->chain->count, grows ? 51u : 11u);
    }
}

// --- What is refused

TEST_P(Walk, RefusesTornChains) {
    struct Case {
        const char* what;
        std::function<void(StaticThread&, std::uint64_t* frame)> break_it;
    };
    const Case cases[] = {
        {"a frame object's frame", [](auto&, auto* f) { put(f, frame_at::owner, 2); }},
        {"an unknown owner", [](auto&, auto* f) { put(f, frame_at::owner, 4); }},
        {"an odd address", [](auto&, auto* f) { f[frame_at::previous / 8] |= 1; }},
        {"no code", [](auto&, auto* f) { put(f, frame_at::code, std::uint64_t{0}); }},
        {"an unreadable caller", [](auto&, auto* f) { put(f, frame_at::previous, 0xdead000); }},
        {"a cycle", [](auto&, auto* f) { put(f, frame_at::previous, f); }},
    };
    for (const Case& each : cases) {
        auto t = start();
        t->call(t->code(1));
        std::uint64_t* middle = t->call(t->code(2));
        t->call(t->code(3));
        ASSERT_EQ(t->take(), SnapshotResult::ok);
        each.break_it(*t, middle);
        EXPECT_EQ(t->take(), SnapshotResult::torn) << each.what;
    }
}

// `yield` clears a generator's link to its caller.
TEST_P(Walk, RefusesAChainThatEndsInAGenerator) {
    auto t = start();
    t->call(t->code(1));
    std::uint64_t* generator = t->generator(t->code(2));
    t->call(t->code(3));
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    put(generator, frame_at::previous, std::uint64_t{0});
    EXPECT_EQ(t->take(), SnapshotResult::torn);
}

TEST_P(Walk, RefusesAChainWithoutItsEntryShim) {
    if (!has_shims(GetParam())) GTEST_SKIP() << "no shims";
    auto t = start();
    std::uint64_t* outermost = t->call(t->code(1));
    t->call(t->code(2));
    put(outermost, frame_at::previous, std::uint64_t{0});
    EXPECT_EQ(t->take(), SnapshotResult::torn);
}

// A popped frame keeps its bytes, but a frame of a thread lies in the used part of its stack.
TEST_P(Walk, RefusesAThreadsFrameOutsideItsStack) {
    auto t = start();
    std::uint64_t* outer = t->call(t->code(1));
    std::uint64_t* stray = t->memory.allocate(8);
    std::memcpy(stray, outer, frame_at::size);
    std::uint64_t* inner = t->call(t->code(2));
    put(inner, frame_at::previous, stray);
    EXPECT_EQ(t->take(), SnapshotResult::torn);
}

TEST_P(Walk, CyclesThroughGeneratorsEnd) {
    auto t = start();
    std::uint64_t* a = t->generator(t->code(1));
    std::uint64_t* b = t->generator(t->code(2));
    put(a, frame_at::previous, b);
    EXPECT_EQ(t->take(nullptr, 1), SnapshotResult::torn);
}

TEST_P(Walk, UnreadableThreadState) {
    auto t = start();
    t->call(t->code(1));
    t->memory.hide(t->tstate, tstate_at::size);
    EXPECT_EQ(t->take(), SnapshotResult::torn);
}

TEST_P(Walk, RefusesAnUnsetCframe) {
    if (!has_cframe(GetParam())) GTEST_SKIP() << "no _PyCFrame";
    auto t = start();
    std::uint64_t* main = t->call(t->code(1));
    std::uint64_t* caller = t->call(t->code(2));
    t->enter();
    t->call(t->code(3));
    ASSERT_EQ(t->take(), SnapshotResult::ok);
    // The new _PyCFrame still holds what an earlier call through C left: a frame whose chain does
    // not go through the frame that makes this call.
    std::uint64_t* stale = t->memory.allocate(8);
    put(stale, frame_at::code, main);
    put(stale, frame_at::previous, main);
    put(stale, frame_at::owner, has_shims(GetParam()) ? 3u : 1u);
    t->show(stale);
    EXPECT_EQ(t->take(), SnapshotResult::torn);
    put(stale, frame_at::previous, caller);
    EXPECT_EQ(t->take(), SnapshotResult::ok);
}

INSTANTIATE_TEST_SUITE_P(All, Walk, testing::Values(Layout::py311, Layout::py312, Layout::py313),
                         [](const auto& parameter) {
                             return std::string(name_of(parameter.param));
                         });

}  // namespace
}  // namespace otel_proflink::test
