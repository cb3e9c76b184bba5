// SPDX-License-Identifier: Apache-2.0
//
// One interval's tables: each thing once, and an honest stand-in for what finds no room.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "profile.hpp"

namespace otel_proflink::test {
namespace {

struct FreeProfile {
    void operator()(Profile* profile) const { profile_free(profile); }
};

class ProfileTest : public testing::Test {
  protected:
    ProfileTest() : profile(Profile::create(10'000'000)) {}

    std::uint32_t string(const std::string& text) {
        return profile->string(text.data(), static_cast<std::uint32_t>(text.size()));
    }
    std::string text(std::uint32_t id) const {
        const StringRef& ref = profile->strings[id];
        return {&profile->text[ref.offset], ref.size};
    }
    // The name of the only frame of a stack.
    std::string name_of(std::uint32_t stack) const {
        EXPECT_EQ(profile->stacks[stack].count, 1u);
        const Location& place = profile->locations[profile->frames[profile->stacks[stack].first]];
        return text(profile->functions[place.function].name);
    }

    std::unique_ptr<Profile, FreeProfile> profile;
};

TEST_F(ProfileTest, StartsAlmostEmpty) {
    EXPECT_EQ(profile->period_ns, 10'000'000u);
    EXPECT_EQ(profile->overflows, 0u);
    EXPECT_LT(profile->fill(), 0.001f);
    EXPECT_EQ(profile->samples.size(), 0u);
    EXPECT_EQ(text(0), "");
}

TEST_F(ProfileTest, StringsAreInterned) {
    const std::uint32_t a = string("alpha");
    EXPECT_EQ(string("alpha"), a);
    EXPECT_NE(string("alph"), a);
    EXPECT_NE(string("alpha "), a);
    EXPECT_EQ(string(""), 0u);
    EXPECT_EQ(text(a), "alpha");
    const std::string with_nul("a\0b", 3);
    EXPECT_EQ(text(string(with_nul)), with_nul);
    EXPECT_NE(string(with_nul), string("a"));
    for (int i = 0; i < 5000; ++i) string("s" + std::to_string(i));
    for (int i = 0; i < 5000; ++i) {
        const std::string want = "s" + std::to_string(i);
        ASSERT_EQ(text(string(want)), want);
    }
}

TEST_F(ProfileTest, FunctionsLocationsAndStacks) {
    const std::uint32_t name = string("f");
    const std::uint32_t file = string("f.py");
    const std::uint32_t f = profile->function(name, file, 10);
    EXPECT_EQ(profile->function(name, file, 10), f);
    EXPECT_NE(profile->function(name, file, 11), f);
    EXPECT_NE(profile->function(file, name, 10), f);
    const std::uint32_t a = profile->location(f, 12);
    const std::uint32_t b = profile->location(f, 13);
    EXPECT_EQ(profile->location(f, 12), a);
    EXPECT_NE(a, b);
    const std::uint32_t ab[] = {a, b};
    const std::uint32_t ba[] = {b, a};
    const std::uint32_t stack = profile->stack(ab, 2);
    EXPECT_EQ(profile->stack(ab, 2), stack);
    EXPECT_NE(profile->stack(ba, 2), stack);
    EXPECT_NE(profile->stack(ab, 1), stack);
    EXPECT_EQ(profile->stacks[stack].count, 2u);
    EXPECT_EQ(profile->frames[profile->stacks[stack].first], a);
}

TEST_F(ProfileTest, NegativeLines) {
    const std::uint32_t f = profile->function(string("f"), 0, -1);
    EXPECT_EQ(profile->functions[f].first_line, -1);
    EXPECT_EQ(profile->locations[profile->location(f, -5)].line, -5);
}

TEST_F(ProfileTest, LinksByValue) {
    LinkData link{};
    for (int i = 0; i < 16; ++i) link.trace_id[i] = static_cast<std::uint8_t>(i);
    const std::uint32_t a = profile->link(link);
    EXPECT_EQ(profile->link(link), a);
    std::vector<LinkData> others(5, link);
    others[0].trace_id[15] ^= 1;
    others[1].span_id[0] ^= 1;
    others[2].local_root_span_id[7] ^= 1;
    others[3].trace_flags ^= 1;
    others[4].span_type ^= 1;
    for (const LinkData& other : others) {
        EXPECT_NE(profile->link(other), a);
    }
    EXPECT_EQ(profile->links.size(), 6u);
}

TEST_F(ProfileTest, ThreadsAndSamples) {
    const std::uint32_t a = profile->thread(1, 100);
    EXPECT_EQ(profile->thread(1, 100), a);
    EXPECT_NE(profile->thread(2, 100), a) << "the kernel hands thread ids out again";
    const std::uint32_t stack = profile->marker_stack("[x]");
    const std::uint32_t sample = profile->sample(stack, kNoEntry, a, ThreadState::running);
    EXPECT_EQ(profile->sample(stack, kNoEntry, a, ThreadState::running), sample);
    EXPECT_NE(profile->sample(stack, kNoEntry, a, ThreadState::blocked), sample);
    EXPECT_NE(profile->sample(stack, kUnknownLink, a, ThreadState::running), sample);
    EXPECT_NE(profile->sample(stack, 0, a, ThreadState::running), sample);
    EXPECT_EQ(profile->samples[sample].count, 0u);
    EXPECT_EQ(name_of(stack), "[x]");
    EXPECT_EQ(profile->marker_stack("[x]"), stack);
}

// --- Full tables. Entry 0 says so by name.

TEST_F(ProfileTest, FullStacksSaySo) {
    const std::uint32_t f = profile->function(string("f"), 0, 1);
    std::uint32_t last = 1;
    std::int32_t line = 0;
    while (last != 0) {
        const std::uint32_t place = profile->location(f, ++line);
        last = profile->stack(&place, 1);
        ASSERT_LT(line, 1 << 20);
    }
    EXPECT_EQ(profile->overflows, 1u);
    EXPECT_EQ(profile->fill(), 1.0f);
    EXPECT_EQ(name_of(0), "[profile tables full]");
    // What has its place keeps it.
    const std::uint32_t early = profile->location(f, 1);
    EXPECT_NE(profile->stack(&early, 1), 0u);
    EXPECT_EQ(profile->overflows, 1u);
}

TEST_F(ProfileTest, FullStringsGiveTheEmptyOne) {
    std::uint32_t last = 1;
    int i = 0;
    while (last != 0) {
        last = string("string " + std::to_string(i++));
        ASSERT_LT(i, 1 << 20);
    }
    EXPECT_GE(profile->overflows, 1u);
    EXPECT_EQ(text(string("string 5")), "string 5");
}

TEST_F(ProfileTest, FullTextIsNotTorn) {
    const std::string large(1u << 20, 'x');
    std::uint32_t last = 1;
    int i = 0;
    while (last != 0) {
        last = string(large + std::to_string(i++));
        ASSERT_LT(i, 100);
    }
    EXPECT_EQ(profile->overflows, 1u);
    EXPECT_EQ(text(string("small")), "small") << "there is still room for a small one";
}

TEST_F(ProfileTest, FullFramesGiveTheStandIn) {
    std::vector<std::uint32_t> ids(1024, profile->location(0, 1));
    std::uint32_t last = 1;
    int i = 0;
    while (last != 0) {
        ids[0] = profile->location(0, i % 1000);
        ids[1] = profile->location(0, i / 1000);
        ++i;
        last = profile->stack(ids.data(), 1024);
        ASSERT_LT(i, 1 << 20);
    }
    EXPECT_EQ(profile->overflows, 1u);
}

TEST_F(ProfileTest, FullLinksAreUnknown) {
    LinkData link{};
    std::uint32_t last = 0;
    std::uint32_t i = 0;
    while (last != kUnknownLink) {
        ++i;
        std::memcpy(link.span_id, &i, 4);
        last = profile->link(link);
        ASSERT_LT(i, 1u << 20);
    }
    EXPECT_EQ(profile->overflows, 1u);
    EXPECT_EQ(profile->links.size(), i - 1);
}

TEST_F(ProfileTest, FullSamplesAreDropped) {
    std::uint32_t last = 0;
    std::uint32_t i = 0;
    while (last != kNoEntry) {
        last = profile->sample(i++, kNoEntry, 0, ThreadState::running);
        ASSERT_LT(i, 1u << 20);
    }
    EXPECT_EQ(profile->overflows, 1u);
    EXPECT_EQ(profile->sample(5, kNoEntry, 0, ThreadState::running), 5u);
}

TEST(TableTest, AddManyIsAllOrNothing) {
    Table<std::uint32_t> table;
    ASSERT_TRUE(table.reserve(4));
    const std::uint32_t items[] = {1, 2, 3};
    EXPECT_EQ(table.add_many(items, 3), 0u);
    EXPECT_EQ(table.add_many(items, 2), kNoEntry);
    EXPECT_EQ(table.size(), 3u);
    EXPECT_EQ(table.add_many(items, 1), 3u);
    EXPECT_TRUE(table.full());
    EXPECT_EQ(table.add(9), kNoEntry);
    EXPECT_EQ(table.add_many(items, 0), 4u);
    EXPECT_EQ(table.fill(), 1.0f);
}

TEST(HashTest, LooksAtEveryByte) {
    char bytes[24] = {};
    const std::uint64_t hash = hash_bytes(bytes, sizeof(bytes));
    for (char& byte : bytes) {
        byte = 1;
        EXPECT_NE(hash_bytes(bytes, sizeof(bytes)), hash);
        byte = 0;
    }
    EXPECT_NE(hash_bytes(bytes, 23), hash);
    EXPECT_NE(hash_bytes(bytes, 8), hash_bytes(bytes, 0));
}

}  // namespace
}  // namespace otel_proflink::test
