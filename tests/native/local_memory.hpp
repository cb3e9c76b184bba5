// SPDX-License-Identifier: Apache-2.0
//
// A memory of its own in which tests lay out CPython's objects as support/synthetic_abi.hpp
// describes them. Whatever lies outside is refused.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "memory.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {

class LocalMemory final : public Memory {
  public:
    explicit LocalMemory(std::size_t size = 1u << 20) : words_(size / 8) {}

    using Memory::read;
    bool read(const ReadRequest* requests, int count) noexcept override {
        ++calls;
        for (int i = 0; i < count; ++i) {
            const ReadRequest& r = requests[i];
            if (r.address < begin() || r.address > end() || r.size > end() - r.address) {
                return false;
            }
            std::memcpy(r.into, reinterpret_cast<const void*>(r.address), r.size);
        }
        return true;
    }

    std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(words_.data()); }
    std::uintptr_t end() const { return begin() + words_.size() * 8; }

    // Zeroed; aligned to 16, as CPython's objects are.
    std::uintptr_t allocate(std::size_t size) {
        const std::uintptr_t at = (begin() + used_ + 15) & ~std::uintptr_t{15};
        used_ = at - begin() + size;
        if (at + size > end()) std::abort();
        return at;
    }
    // The last `size` bytes: whatever reads past them is refused.
    std::uintptr_t at_end(std::size_t size) { return end() - size; }

    template <typename T>
    void put(std::uintptr_t at, T value) {
        std::memcpy(reinterpret_cast<void*>(at), &value, sizeof(value));
    }

    std::uintptr_t bytes(const std::vector<std::uint8_t>& data) {
        const std::uintptr_t at = allocate(32 + data.size());
        put<std::uint64_t>(at + 16, data.size());
        if (!data.empty()) {
            std::memcpy(reinterpret_cast<void*>(at + 32), data.data(), data.size());
        }
        return at;
    }

    // A str of `units` of `kind` bytes each, whose hash is made up from its content.
    std::uintptr_t string(unsigned kind, bool ascii, const std::vector<std::uint32_t>& units) {
        const std::uintptr_t at = allocate(56 + units.size() * kind);
        put<std::uint64_t>(at + 16, units.size());
        std::uint64_t hash = 17;
        for (const std::uint32_t unit : units) hash = hash * 31 + unit;
        put<std::uint64_t>(at + 24, hash);
        put<std::uint32_t>(at + 32, kind << 2 | 1u << 5 | (ascii ? 1u << 6 : 0u));
        std::uintptr_t data = at + (ascii ? 40u : 56u);
        for (const std::uint32_t unit : units) {
            std::memcpy(reinterpret_cast<void*>(data), &unit, kind);  // little-endian
            data += kind;
        }
        return at;
    }
    std::uintptr_t string(const std::string& text) {
        return string(1, true, std::vector<std::uint32_t>(text.begin(), text.end()));
    }

    std::uint64_t calls = 0;

  private:
    std::vector<std::uint64_t> words_;
    std::size_t used_ = 0;
};

}  // namespace otel_proflink::test
