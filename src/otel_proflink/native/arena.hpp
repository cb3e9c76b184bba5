// SPDX-License-Identifier: Apache-2.0
//
// Fixed-capacity storage for the tick: address space is reserved once, pages appear when touched,
// nothing is allocated while sampling.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "resident.hpp"

namespace otel_proflink {

template <typename T>
class Reserved {
  public:
    Reserved() = default;
    Reserved(const Reserved&) = delete;
    Reserved& operator=(const Reserved&) = delete;
    ~Reserved() { release(); }

    // Fresh and zero, whatever was there before.
    bool reserve(std::uint32_t capacity) noexcept {
        release();
        void* memory = mmap(nullptr, sizeof(T) * capacity, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        data_ = static_cast<T*>(memory);
        capacity_ = capacity;
        return true;
    }

    T& operator[](std::uint32_t i) noexcept { return data_[i]; }
    const T& operator[](std::uint32_t i) const noexcept { return data_[i]; }
    std::uint32_t capacity() const noexcept { return capacity_; }
    std::uint64_t resident() const noexcept {
        return data_ == nullptr ? 0 : resident_bytes(data_, sizeof(T) * capacity_);
    }

  private:
    void release() noexcept {
        if (data_ != nullptr) munmap(data_, sizeof(T) * capacity_);
        data_ = nullptr;
        capacity_ = 0;
    }

    T* data_ = nullptr;
    std::uint32_t capacity_ = 0;
};

// In static storage and never destroyed: threads, and signals, may outlive static destructors.
template <typename T>
union Immortal {
    Immortal() noexcept : value() {}
    ~Immortal() {}
    T value;
};

inline constexpr std::uint32_t kNoEntry = 0xffffffffu;

// An append-only table with numbered entries.
template <typename T>
class Table {
  public:
    bool reserve(std::uint32_t capacity) noexcept { return items_.reserve(capacity); }
    std::uint32_t size() const noexcept { return size_; }
    bool full() const noexcept { return size_ == items_.capacity(); }
    float fill() const noexcept {
        return static_cast<float>(size_) / static_cast<float>(items_.capacity());
    }
    std::uint64_t resident() const noexcept { return items_.resident(); }
    T& operator[](std::uint32_t i) noexcept { return items_[i]; }
    const T& operator[](std::uint32_t i) const noexcept { return items_[i]; }

    // kNoEntry when full.
    std::uint32_t add(const T& item) noexcept {
        if (full()) return kNoEntry;
        items_[size_] = item;
        return size_++;
    }

    // Room for `count` items in a row; kNoEntry when there is none.
    std::uint32_t add_many(const T* from, std::uint32_t count) noexcept {
        if (count > items_.capacity() - size_) return kNoEntry;
        const std::uint32_t first = size_;
        if (count != 0) std::memcpy(&items_[first], from, sizeof(T) * count);
        size_ += count;
        return first;
    }

  private:
    Reserved<T> items_;
    std::uint32_t size_ = 0;
};

inline std::uint64_t mix(std::uint64_t x) noexcept {  // splitmix64's finaliser
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

inline std::uint64_t hash_bytes(const void* data, std::size_t size) noexcept {
    const auto* bytes = static_cast<const unsigned char*>(data);
    std::uint64_t hash = size;
    while (size >= 8) {
        std::uint64_t word;
        std::memcpy(&word, bytes, 8);
        hash = mix(hash ^ word);
        bytes += 8;
        size -= 8;
    }
    std::uint64_t word = 0;
    if (size != 0) std::memcpy(&word, bytes, size);
    return mix(hash ^ word);
}

// Open addressing over entry numbers of a Table; twice the table's capacity, so never full.
class Index {
  public:
    bool reserve(std::uint32_t table_capacity) noexcept {
        std::uint32_t size = 16;
        while (size < table_capacity * 2) size *= 2;
        mask_ = size - 1;
        return slots_.reserve(size);
    }

    // The first entry for which `equal(entry)`, else the slot where it belongs.
    template <typename Equal>
    std::uint32_t find(std::uint64_t hash, Equal equal, std::uint32_t* slot) const noexcept {
        for (std::uint32_t i = static_cast<std::uint32_t>(hash) & mask_;; i = (i + 1) & mask_) {
            const std::uint32_t entry = slots_[i];
            if (entry == 0 || equal(entry - 1)) {
                *slot = i;
                return entry == 0 ? kNoEntry : entry - 1;
            }
        }
    }

    void set(std::uint32_t slot, std::uint32_t entry) noexcept { slots_[slot] = entry + 1; }

    std::uint64_t resident() const noexcept { return slots_.resident(); }

  private:
    Reserved<std::uint32_t> slots_;  // entry + 1; 0 = empty, which is what fresh pages hold
    std::uint32_t mask_ = 0;
};

}  // namespace otel_proflink
