// SPDX-License-Identifier: Apache-2.0
//
// Iteration counts that a slow build (sanitizers) or a long run can change from outside.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace otel_proflink::test {

// PROFLINK_TEST_EFFORT=0.1 does a tenth of the iterations, 100 does a hundred times as many.
inline double effort() {
    static const double value = [] {
        const char* text = std::getenv("PROFLINK_TEST_EFFORT");
        const double parsed = text == nullptr ? 1.0 : std::atof(text);
        return parsed > 0 ? parsed : 1.0;
    }();
    return value;
}

inline std::uint64_t scaled(std::uint64_t iterations) {
    const auto count = static_cast<std::uint64_t>(static_cast<double>(iterations) * effort());
    return count == 0 ? 1 : count;
}

}  // namespace otel_proflink::test
