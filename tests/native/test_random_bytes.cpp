// SPDX-License-Identifier: Apache-2.0
//
// Readers over a memory that answers with anything at all: they may refuse, but must not crash,
// write out of bounds or run on.
#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "code.hpp"
#include "support/effort.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {
namespace {

// Half of the words mean something to a reader, so that the answers lead beyond the first check.
class RandomMemory final : public Memory {
  public:
    explicit RandomMemory(std::uint64_t seed) : random_(seed) {}
    using Memory::read;
    bool read(const ReadRequest* requests, int count) noexcept override {
        for (int i = 0; i < count; ++i) {
            // No reader has a buffer larger than this: it asked for more than it has room for.
            if (requests[i].size > 16'384) return ++oversized, false;
            auto* into = static_cast<unsigned char*>(requests[i].into);
            for (std::uint32_t at = 0; at < requests[i].size; at += 8) {
                const std::uint64_t word = next(requests[i].address + at);
                std::memcpy(into + at, &word, std::min(8u, requests[i].size - at));
            }
        }
        return random_() % 64 != 0;
    }
    std::uint64_t oversized = 0;
    static constexpr std::uintptr_t kTstate = 0x7f0000001000, kChunk = 0x7f0000010000;

  private:
    std::uint64_t next(std::uintptr_t address) {
        if (address == kTstate + tstate_at::interp) return kInterpreter;
        if (address == kTstate + tstate_at::native_thread_id) return 42;
        if (address == kTstate + tstate_at::id) return 7;
        const std::uint64_t word = random_();
        switch (word >> 60) {
            case 0:
                return 0;
            case 1:
                return ~std::uint64_t{0} - word % 256;
            case 2:
                return (~std::uint64_t{0} - word % 256) & ~std::uint64_t{7};
            case 3:
                return word % 64;
            case 4:
            case 5:
                return kChunk + word % 0x4000 / 8 * 8;
            case 6:
                return 0x4000;
            case 7: {
                constexpr std::uintptr_t kKnown[] = {kCodeType, kBitmapType, kArrayType, kValueType,
                                                     kVariable};
                return kKnown[word % 5];
            }
            default:
                return random_();
        }
    }
    std::mt19937_64 random_;
};

class RandomBytes : public testing::TestWithParam<Layout> {};

TEST_P(RandomBytes, Readers) {
    const ProflinkAbi abi = make_abi(GetParam());
    const ContextKey key = make_key();
    RandomMemory memory(1);
    std::mt19937_64 random(2);
    const auto out = std::make_unique<Utf8>();
    for (std::uint64_t i = 0; i < scaled(40'000); ++i) {
        if (read_string(memory, abi, random() | 1, out.get())) {
            ASSERT_LE(out->size, sizeof(out->data));
        }
        std::int32_t line = 0;
        read_line(memory, abi, random() | 1, 1, static_cast<std::int32_t>(random() % 100), &line);
        LabelSource source;
        ASSERT_NE(read_label(memory, abi, key, random() | 1, random() | 1, &source).state,
                  LabelState::linked);
    }
    EXPECT_EQ(memory.oversized, 0u);
}

TEST_P(RandomBytes, SnapshotAndCodeTable) {
    const ProflinkAbi abi = make_abi(GetParam());
    const ContextKey key = make_key();
    RandomMemory memory(3);
    Profile* profile = Profile::create(1);
    const auto codes = std::make_unique<CodeTable>(memory, abi);
    ASSERT_TRUE(codes->begin(profile, nullptr));
    const auto snapshotter = std::make_unique<Snapshotter>(memory, abi, key);
    const auto chain = std::make_unique<Chain>();
    const ThreadKey thread{RandomMemory::kTstate, 7, 42, nullptr, attach_slots_assigned()};
    std::mt19937_64 random(4);
    for (std::uint64_t i = 0; i < scaled(100'000); ++i) {
        ThreadCache cache;
        snapshotter->take(thread, &cache, chain.get(), codes.get());
        ASSERT_LE(chain->count, kMaxFrames);
        chain->count = 1;
        chain->omitted = 0;
        chain->frames[0].code = RandomMemory::kChunk;
        chain->frames[0].instruction = i % 2 == 0 ? random() : RandomMemory::kChunk + 64 + i % 64;
        codes->visit(*chain);
        codes->rollback();
    }
    EXPECT_EQ(memory.oversized, 0u);
    profile_free(profile);
}

INSTANTIATE_TEST_SUITE_P(All, RandomBytes,
                         testing::Values(Layout::py311, Layout::py312, Layout::py313),
                         [](const auto& parameter) { return name_of(parameter.param); });

}  // namespace
}  // namespace otel_proflink::test
