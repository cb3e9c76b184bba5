// SPDX-License-Identifier: Apache-2.0
//
// What tables take up: what was touched of them, not what was reserved.
#include "resident.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include "arena.hpp"
#include "profile.hpp"

namespace otel_proflink::test {
namespace {

TEST(Resident, CountsTouchedPages) {
    const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
    Reserved<char> memory;
    EXPECT_EQ(memory.resident(), 0u) << "nothing is reserved yet";
    const auto size = static_cast<std::uint32_t>(10'000 * page + 1);  // more than one system call's
    ASSERT_TRUE(memory.reserve(size));
    EXPECT_EQ(memory.resident(), 0u);
    for (const std::uint64_t at : {std::uint64_t{0}, 5'000 * page, 10'000 * page}) {
        memory[static_cast<std::uint32_t>(at)] = 1;
    }
    const std::uint64_t resident = memory.resident();
    // With huge pages the kernel may give more than was asked for.
    EXPECT_GE(resident, 3 * page);
    EXPECT_LE(resident, 3 * 512 * page);
}

TEST(Resident, ReservingAgainGivesTheOldPagesBack) {
    Reserved<char> memory;
    ASSERT_TRUE(memory.reserve(1 << 20));
    memory[0] = 1;
    EXPECT_GT(memory.resident(), 0u);
    ASSERT_TRUE(memory.reserve(1 << 20));
    EXPECT_EQ(memory[0], 0);
}

TEST(Resident, AProfileGrowsWithWhatIsInIt) {
    Profile* profile = Profile::create(1'000'000);
    ASSERT_NE(profile, nullptr);
    const std::uint64_t empty = profile->resident();
    EXPECT_GT(empty, 0u);
    EXPECT_LT(empty, 64u << 20);
    std::uint64_t last = empty;
    for (std::uint32_t i = 0; i < 100'000; ++i) {
        const std::uint32_t place = profile->location(0, static_cast<std::int32_t>(i));
        profile->sample(profile->stack(&place, 1), kNoEntry, kNoEntry, ThreadState::blocked);
    }
    last = profile->resident();
    EXPECT_GT(last, empty + 100'000 * (sizeof(Sample) + sizeof(Location)));
    profile_free(profile);
}

}  // namespace
}  // namespace otel_proflink::test
