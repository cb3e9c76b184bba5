// SPDX-License-Identifier: Apache-2.0
//
// A thread at rest, laid out by hand: for tests of what a snapshot reads, not of when.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "snapshot.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {

// A block of memory; all else is unreadable. Counts what is read.
class FlatMemory final : public Memory {
  public:
    explicit FlatMemory(std::size_t words) : words_(words) {}
    using Memory::read;

    bool read(const ReadRequest* requests, int count) noexcept override {
        ++calls_;
        if (before_read) before_read(requests, count);
        for (int i = 0; i < count; ++i) {
            const ReadRequest& request = requests[i];
            bytes_ += request.size;
            if (!holds(request.address, request.size)) return false;
            std::memcpy(request.into, reinterpret_cast<const void*>(request.address), request.size);
        }
        return true;
    }

    std::uint64_t* allocate(std::size_t words) {
        words = (words + 1) / 2 * 2;
        if (used_ + words > words_.size()) throw std::length_error("flat memory is full");
        std::uint64_t* block = words_.data() + used_;
        used_ += words;
        return block;
    }

    // The thread goes on.
    std::function<void(const ReadRequest*, int)> before_read;

    // Makes a range unreadable.
    void hide(const void* address, std::size_t size) {
        const auto begin = reinterpret_cast<std::uintptr_t>(address);
        hidden_.emplace_back(begin, begin + size);
    }

    bool holds(std::uintptr_t address, std::size_t size) const {
        const auto begin = reinterpret_cast<std::uintptr_t>(words_.data());
        const std::uintptr_t end = begin + words_.size() * sizeof(std::uint64_t);
        if (address < begin || address > end || size > end - address) return false;
        return std::none_of(hidden_.begin(), hidden_.end(), [&](const auto& range) {
            return address < range.second && address + size > range.first;
        });
    }

    std::uint64_t calls() const { return calls_; }
    std::uint64_t bytes() const { return bytes_; }

  private:
    std::vector<std::uint64_t> words_;
    std::size_t used_ = 64;
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> hidden_;
    std::uint64_t calls_ = 0;
    std::uint64_t bytes_ = 0;
};

template <typename T>
void put(std::uint64_t* base, std::uint32_t offset, T value) {
    if constexpr (std::is_pointer_v<T>) {
        base[offset / 8] = reinterpret_cast<std::uint64_t>(value);
    } else if constexpr (!std::is_null_pointer_v<T>) {
        base[offset / 8] = static_cast<std::uint64_t>(value);
    } else {
        base[offset / 8] = 0;
    }
}

class StaticThread {
  public:
    explicit StaticThread(Layout layout, std::size_t words = 1u << 18)
        : memory(words), abi(make_abi(layout)), key(make_key()), layout_(layout) {
        tstate = memory.allocate(tstate_at::size / 8);
        put(tstate, tstate_at::interp, kInterpreter);
        put(tstate, tstate_at::native_thread_id, 4711);
        put(tstate, tstate_at::id, 12);
        put(tstate, tstate_at::context_ver, 1);
        slot.tid.store(4711);
        if (has_cframe(layout)) {
            root_cframe_ = memory.allocate(4);
            cframe_ = root_cframe_;
            put(tstate, tstate_at::frame, cframe_);
        }
    }

    ThreadKey thread() const {
        return {reinterpret_cast<std::uintptr_t>(tstate), 12, 4711, &slot, 0};
    }

    // A new live data stack chunk with room for `words`; the one before keeps what it has.
    void chunk(std::size_t words) {
        std::uint64_t* made = memory.allocate(words + 8);
        if (chunk_ != nullptr) {
            put(chunk_, chunk_at::top,
                static_cast<std::uint64_t>(top_ - (chunk_ + chunk_at::data / 8)));
        }
        put(made, chunk_at::previous, chunk_);
        put(made, chunk_at::size, (words + 8) * 8);
        put(made, chunk_at::top, std::uint64_t{0});
        chunk_ = made;
        top_ = made + chunk_at::data / 8 + (made[0] == 0 ? 1 : 0);
        put(tstate, tstate_at::chunk, chunk_);
        put(tstate, tstate_at::top, top_);
    }

    std::uint64_t* code(std::uint32_t number) {
        std::uint64_t* made = memory.allocate(code_at::size / 8 + 64);
        put(made, kTypeAt, kCodeType);
        put(made, code_at::units, 128);
        put(made, code_at::first_line, number);
        return made;
    }

    std::uint64_t* frame(std::uint64_t* at, const void* code, std::uint8_t owner) {
        put(at, frame_at::code, code);
        put(at, frame_at::previous, leaf_);
        put(at, frame_at::instruction,
            code == nullptr ? 0 : reinterpret_cast<std::uint64_t>(code) + code_at::size);
        put(at, frame_at::owner, owner);
        show(at);
        return at;
    }

    // A call into Python from C: the _PyCFrame and the entry shim of this layout.
    void enter() {
        if (has_cframe(layout_)) {
            std::uint64_t* cframe = memory.allocate(4);
            const std::uint32_t current = layout_ == Layout::py311 ? 8 : 0;
            put(cframe, current, leaf_);
            put(cframe, current + 8, cframe_);
            cframe_ = cframe;
            put(tstate, tstate_at::frame, cframe_);
        }
        if (has_shims(layout_)) frame(memory.allocate(frame_at::size / 8), tstate, 3);
    }

    std::uint64_t* call(const void* code, std::size_t locals = 2) {
        std::uint64_t* at = top_;
        top_ += frame_at::size / 8 + locals;
        put(tstate, tstate_at::top, top_);
        return frame(at, code, 0);
    }

    std::uint64_t* generator(const void* code) {
        return frame(memory.allocate(frame_at::size / 8 + 4), code, 1);
    }

    void show(std::uint64_t* leaf) {
        leaf_ = leaf;
        if (has_cframe(layout_)) {
            put(cframe_, layout_ == Layout::py311 ? 8 : 0, leaf);
        } else {
            put(tstate, tstate_at::frame, leaf);
        }
    }

    std::uint64_t* leaf() const { return leaf_; }
    std::uint64_t* top() const { return top_; }
    Layout layout() const { return layout_; }

    // A few attempts, as the sampler makes them.
    SnapshotResult take(FrameVisitor* visitor = nullptr, int attempts = 3) {
        Snapshotter& snapshotter = this->snapshotter();
        SnapshotResult result = SnapshotResult::torn;
        for (int i = 0; i < attempts && result == SnapshotResult::torn; ++i) {
            result = snapshotter.take(thread(), &cache, chain.get(), visitor);
        }
        return result;
    }

    Snapshotter& snapshotter() {
        if (!snapshotter_) snapshotter_ = std::make_unique<Snapshotter>(memory, abi, key);
        return *snapshotter_;
    }

    FlatMemory memory;
    ProflinkAbi abi;
    ContextKey key;
    std::uint64_t* tstate;
    AttachSlot slot{};
    ThreadCache cache;
    std::unique_ptr<Chain> chain = std::make_unique<Chain>();

  private:
    Layout layout_;
    std::unique_ptr<Snapshotter> snapshotter_;
    std::uint64_t* root_cframe_ = nullptr;
    std::uint64_t* cframe_ = nullptr;
    std::uint64_t* chunk_ = nullptr;
    std::uint64_t* top_ = nullptr;
    std::uint64_t* leaf_ = nullptr;
};

}  // namespace otel_proflink::test
