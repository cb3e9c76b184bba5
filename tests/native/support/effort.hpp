// SPDX-License-Identifier: Apache-2.0
//
// Iteration counts that a slow build (sanitizers) or a long run can change from outside.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace otel_proflink::test {

// What sanitizers make thirty times slower is done that much less unless asked for.
#if defined(__SANITIZE_THREAD__)
inline constexpr double kUsualEffort = 0.03;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr double kUsualEffort = 0.1;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr double kUsualEffort = 0.1;
#else
inline constexpr double kUsualEffort = 1;
#endif
#else
inline constexpr double kUsualEffort = 1;
#endif

// PROFLINK_TEST_EFFORT=0.1 does a tenth of the iterations, 100 does a hundred times as many.
inline double effort() {
    static const double value = [] {
        const char* text = std::getenv("PROFLINK_TEST_EFFORT");
        const double parsed = text == nullptr ? kUsualEffort : std::atof(text);
        return parsed > 0 ? parsed : kUsualEffort;
    }();
    return value;
}

inline std::uint64_t scaled(std::uint64_t iterations) {
    const auto count = static_cast<std::uint64_t>(static_cast<double>(iterations) * effort());
    return count == 0 ? 1 : count;
}

}  // namespace otel_proflink::test
