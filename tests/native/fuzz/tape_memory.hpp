// SPDX-License-Identifier: Apache-2.0
//
// A memory whose answers are a fuzzer's bytes.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "link.hpp"
#include "memory.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "fuzz target: %s\n", what);
    std::abort();
}

inline constexpr std::uintptr_t kTstate = 0x7f0000001000;
inline constexpr std::uintptr_t kRegion = 0x7f0000010000;
// No buffer of any reader is larger: it would have asked for more than it has room for.
inline constexpr std::uint32_t kMaxRead = 16384;
// Far above what the longest honest walk needs; a reader that goes on has lost its way.
inline constexpr std::uint64_t kMaxCalls = 1u << 18;

// Answers from a tape: a byte says what kind of word follows, so that few bytes lead far. When the
// tape ends all reads fail.
class TapeMemory final : public Memory {
  public:
    TapeMemory(const std::uint8_t* data, std::size_t size, const LinkRecord* record)
        : at_(data), end_(data + size), record_(record) {}
    using Memory::read;

    bool read(const ReadRequest* requests, int count) noexcept override {
        require(++calls_ < kMaxCalls, "reads without end");
        for (int i = 0; i < count; ++i) {
            const ReadRequest& request = requests[i];
            require(request.size <= kMaxRead, "a read larger than any buffer");
            auto* into = static_cast<unsigned char*>(request.into);
            std::memset(into, 0, request.size);  // all of it is there to be written to
            for (std::uint32_t at = 0; at < request.size; at += 8) {
                if (at_ == end_) return false;
                const std::uint64_t word = next(request.address + at);
                std::memcpy(into + at, &word, std::min(8u, request.size - at));
                // Large windows are mostly one thing.
                if (at >= 512) break;
            }
        }
        return true;
    }

    // What thread states say that they belong to.
    std::uintptr_t interpreter = kInterpreter;

  private:
    std::uint64_t raw(std::size_t bytes) {
        std::uint64_t value = 0;
        const std::size_t left = std::min<std::size_t>(bytes, static_cast<std::size_t>(end_ - at_));
        std::memcpy(&value, at_, left);
        at_ += left;
        return value;
    }

    std::uint64_t next(std::uintptr_t address) {
        // A thread that is the right one; else no tape would get past the first check.
        if (address == kTstate + tstate_at::interp) return interpreter;
        if (address == kTstate + tstate_at::native_thread_id) return 42;
        if (address == kTstate + tstate_at::id) return 7;
        const std::uint8_t kind = *at_++;
        switch (kind >> 4) {
            case 0:
                return 0;
            case 1:
                return kind & 15;
            case 2:
                return raw(1);
            case 3:
            case 4:
            case 5:
                return kRegion + 8 * raw(1);
            case 6: {
                const std::uint64_t known[] = {
                    kCodeType, kBitmapType, kArrayType, kValueType,   kVariable,      kContextType,
                    kTstate,   kRegion,     kMaxRead,   kMaxRead - 8, kOtherVariable, interpreter};
                return known[(kind & 15) % std::size(known)];
            }
            case 7:
                return reinterpret_cast<std::uint64_t>(record_);
            case 8:
                return record_->serial.load(std::memory_order_relaxed);
            case 9:
                return last_ = kRegion + (kind & 15) * 32;
            case 10:
                return last_;
            case 11:
                return last_ + 8 * static_cast<std::uint64_t>(kind & 15) + code_at::size;
            case 12:
                return ~std::uint64_t{0} - raw(1);
            case 13:
                return std::uint64_t{1} << (raw(1) & 63);
            case 14:
                return raw(4);
            default:
                return raw(8);
        }
    }

    const std::uint8_t* at_;
    const std::uint8_t* end_;
    const LinkRecord* record_;
    std::uint64_t last_ = kRegion;
    std::uint64_t calls_ = 0;
};

}  // namespace otel_proflink::test
