// SPDX-License-Identifier: Apache-2.0
//
// What arbitrary bytes are fed to. Each target takes its bytes as the answers of a memory, so that
// two reads of one place may differ, as they do under a running thread. It aborts on what must not
// happen; that nothing is written out of bounds is the sanitizers' part.
#pragma once

#include <cstddef>
#include <cstdint>

namespace otel_proflink::test {

void fuzz_snapshot(const std::uint8_t* data, std::size_t size);  // thread, frames, label, codes
void fuzz_code(const std::uint8_t* data, std::size_t size);      // code headers, names, lines
void fuzz_threads(const std::uint8_t* data, std::size_t size);   // the list of thread states
void fuzz_label(const std::uint8_t* data, std::size_t size);     // context, HAMT, value
void fuzz_strings(const std::uint8_t* data, std::size_t size);   // str, location table

}  // namespace otel_proflink::test
