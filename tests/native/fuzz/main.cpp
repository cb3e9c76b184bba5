// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer's entry point; the target is chosen at build time.
#include "fuzz/targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    otel_proflink::test::PROFLINK_FUZZ_TARGET(data, size);
    return 0;
}
