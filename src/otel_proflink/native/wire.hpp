// SPDX-License-Identifier: Apache-2.0
//
// Protocol Buffers' wire format, writing side (protobuf.dev/programming-guides/encoding).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace otel_proflink {

// Grows by doubling. An allocation that fails sets `failed` and drops what follows: the caller
// looks once, at the end.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    void bytes(const void* from, std::size_t size) noexcept {
        if (size == 0 || !grow(size)) return;
        std::memcpy(data_ + size_, from, size);
        size_ += size;
    }

    void varint(std::uint64_t value) noexcept {
        if (!grow(10)) return;
        while (value >= 0x80) {
            data_[size_++] = static_cast<unsigned char>(value | 0x80);
            value >>= 7;
        }
        data_[size_++] = static_cast<unsigned char>(value);
    }

    // Fields: zero values are left out, as proto3 does.
    void field(std::uint32_t number, std::uint64_t value) noexcept {
        if (value == 0) return;
        varint(number << 3);
        varint(value);
    }

    void field(std::uint32_t number, const void* from, std::size_t size) noexcept {
        varint(number << 3 | 2);
        varint(size);
        bytes(from, size);
    }

    void field(std::uint32_t number, const Buffer& message) noexcept {
        if (message.failed_) failed_ = true;
        field(number, message.data_, message.size_);
    }

    void clear() noexcept { size_ = 0; }
    bool failed() const noexcept { return failed_; }
    const unsigned char* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }

  private:
    bool grow(std::size_t more) noexcept {
        if (failed_) return false;
        if (size_ + more <= capacity_) return true;
        std::size_t capacity = capacity_ == 0 ? 256 : capacity_ * 2;
        while (capacity < size_ + more) capacity *= 2;
        void* data = std::realloc(data_, capacity);
        if (data == nullptr) {
            failed_ = true;
            return false;
        }
        data_ = static_cast<unsigned char*>(data);
        capacity_ = capacity;
        return true;
    }

    unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t capacity_ = 0;
    bool failed_ = false;
};

}  // namespace otel_proflink
