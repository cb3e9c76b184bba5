// SPDX-License-Identifier: Apache-2.0
//
// The fuzz targets under a seeded random driver, so that every build with sanitizers runs them.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "fuzz/targets.hpp"
#include "support/effort.hpp"

namespace otel_proflink::test {
namespace {

using Target = void (*)(const std::uint8_t*, std::size_t);

void drive(Target target, std::uint64_t rounds) {
    std::mt19937_64 random(20261123);
    std::vector<std::uint8_t> bytes;
    for (std::uint64_t round = 0; round < rounds; ++round) {
        // Small inputs, some of them changed a little instead of made anew.
        const bool change = !bytes.empty() && random() % 4 != 0;
        if (change) {
            for (std::uint64_t n = 1 + random() % 8; n-- > 0;) {
                bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
            }
        } else {
            bytes.resize(1 + random() % (random() % 8 == 0 ? 4000 : 400));
            for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
        }
        // From a buffer of just this size, so that the sanitizers see a read past its end.
        const std::vector<std::uint8_t> exact(bytes);
        target(exact.data(), exact.size());
    }
}

TEST(Fuzz, Snapshot) { drive(fuzz_snapshot, scaled(100'000)); }
TEST(Fuzz, Code) { drive(fuzz_code, scaled(100'000)); }
TEST(Fuzz, Threads) { drive(fuzz_threads, scaled(100'000)); }
TEST(Fuzz, Label) { drive(fuzz_label, scaled(100'000)); }
TEST(Fuzz, Strings) { drive(fuzz_strings, scaled(100'000)); }
TEST(Fuzz, NoBytes) {
    const std::uint8_t none = 0;
    for (const Target target : {fuzz_snapshot, fuzz_code, fuzz_threads, fuzz_label, fuzz_strings}) {
        target(&none, 0);
    }
}

}  // namespace
}  // namespace otel_proflink::test
