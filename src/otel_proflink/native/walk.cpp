// SPDX-License-Identifier: Apache-2.0
#include "walk.hpp"

#include <algorithm>
#include <cstring>

namespace otel_proflink {
namespace {

template <typename T>
T load(const unsigned char* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

constexpr std::uint32_t kHalf = kMaxFrames / 2;
// Chunks stepped over while looking for a frame's home: enough for any real recursion.
constexpr int kMaxChunks = 1024;

bool plausible(std::uintptr_t address) noexcept {
    return address != 0 && address % sizeof(void*) == 0;
}

}  // namespace

void FrameReader::begin(const DataStack& stack) noexcept {
    chunk_ = stack.chunk;
    chunk_begin_ = stack.chunk == 0 ? 0 : stack.chunk + abi_.frame.chunk_data;
    chunk_end_ = stack.top;
    begin_ = end_ = 0;
}

// Frames of a thread lie in its chunks from the newest to the oldest, so a frame that is not in
// this chunk lies in an older one, or outside the data stack altogether.
bool FrameReader::enter_chunk_of(std::uintptr_t address) noexcept {
    if (address >= chunk_begin_ && address < chunk_end_) return true;
    std::uintptr_t chunk = chunk_;
    for (int i = 0; i < kMaxChunks && chunk != 0; ++i) {
        std::uintptr_t previous = 0;
        if (!memory_.read(chunk + abi_.frame.chunk_previous, &previous, sizeof(previous))) {
            return false;
        }
        if (previous == 0) return false;
        unsigned char header[64];
        if (abi_.frame.chunk_data > sizeof(header) ||
            !memory_.read(previous, header, abi_.frame.chunk_data)) {
            return false;
        }
        const auto size = load<std::uint64_t>(header + abi_.frame.chunk_size);
        const auto top = load<std::uint64_t>(header + abi_.frame.chunk_top);
        // `top` counts pointers used; it is exact in every chunk but the live one.
        const std::uintptr_t data = previous + abi_.frame.chunk_data;
        if (address >= data && address < data + top * sizeof(void*) &&
            top * sizeof(void*) <= size) {
            chunk_ = previous;
            chunk_begin_ = data;
            chunk_end_ = data + top * sizeof(void*);
            return true;
        }
        chunk = previous;
    }
    return false;
}

const unsigned char* FrameReader::locate(std::uintptr_t address) noexcept {
    const std::uint32_t size = abi_.frame.size;
    if (address >= begin_ && address + size <= end_) return buffer_ + (address - begin_);
    // Generator frames and entry shims live elsewhere: near-by addresses say nothing, read alone.
    const bool in_live = address >= chunk_begin_ && address < chunk_end_;
    if (!in_live) {
        if (size > sizeof(single_)) return nullptr;
        if (memory_.read(address, single_, size)) {
            const std::uint8_t owner = single_[abi_.frame.owner];
            if (owner != 0 || !enter_chunk_of(address)) return single_;
        } else {
            return nullptr;
        }
    }
    const std::uintptr_t end = address + size;
    if (end > chunk_end_) return nullptr;
    const std::uintptr_t begin =
        end - chunk_begin_ > kWindow ? end - kWindow : chunk_begin_;
    if (!memory_.read(begin, buffer_, static_cast<std::uint32_t>(end - begin))) return nullptr;
    begin_ = begin;
    end_ = end;
    return buffer_ + (address - begin_);
}

bool FrameReader::read(std::uintptr_t address, Frame* frame) noexcept {
    if (!plausible(address)) return false;
    const unsigned char* raw = locate(address);
    if (raw == nullptr) return false;
    frame->address = address;
    frame->code = load<std::uintptr_t>(raw + abi_.frame.code);
    frame->previous = load<std::uintptr_t>(raw + abi_.frame.previous);
    frame->instruction = load<std::uintptr_t>(raw + abi_.frame.instruction);
    frame->owner = raw[abi_.frame.owner];
    return true;
}

bool walk(FrameReader& reader, const ProflinkAbi& abi, const DataStack& stack, std::uintptr_t leaf,
          Chain* chain) noexcept {
    chain->count = 0;
    chain->omitted = 0;
    reader.begin(stack);
    std::uint32_t total = 0;
    std::uint8_t last_owner = 0;
    std::uintptr_t address = leaf;
    for (std::uint32_t steps = 0; address != 0; ++steps) {
        if (steps == kMaxWalk) return false;
        Frame frame;
        if (!reader.read(address, &frame) || frame.owner > abi.frame.owner_last ||
            frame.owner == abi.frame.owner_frame_object) {
            return false;
        }
        last_owner = frame.owner;
        address = frame.previous;
        if (frame.owner == abi.frame.owner_c_stack) continue;  // entry shim: not Python code
        if (!plausible(frame.code)) return false;
        const std::uint32_t place = total < kMaxFrames ? total : kHalf + (total - kHalf) % kHalf;
        chain->frames[place] = frame;
        ++total;
    }
    // Every thread's outermost frame is entered from C: up to 3.11 that is an ordinary function,
    // from 3.12 on an entry shim. `yield` clears a generator's link, so that a torn chain may end
    // early but looks whole: it then ends elsewhere.
    if (leaf != 0) {
        const bool at_root = abi.frame.owner_c_stack != PROFLINK_ABI_NO_OWNER
                                 ? last_owner == abi.frame.owner_c_stack
                                 : last_owner != abi.frame.owner_generator;
        if (!at_root) return false;
    }
    if (total > kMaxFrames) {
        chain->omitted = total - kMaxFrames;
        Frame* ring = chain->frames + kHalf;
        std::rotate(ring, ring + (total - kHalf) % kHalf, ring + kHalf);
        total = kMaxFrames;
    }
    chain->count = total;
    return true;
}

bool same_chain(FrameReader& reader, const DataStack& stack, const Chain& chain,
                std::uint32_t limit) noexcept {
    reader.begin(stack);
    std::uint32_t count = std::min(chain.count, limit);
    if (chain.omitted != 0) count = std::min(count, kHalf);
    for (std::uint32_t i = 0; i < count; ++i) {
        const Frame& before = chain.frames[i];
        Frame now;
        if (!reader.read(before.address, &now) || now.code != before.code ||
            now.previous != before.previous || now.owner != before.owner) {
            return false;
        }
        if (i != 0 && now.instruction != before.instruction) return false;
    }
    return true;
}

}  // namespace otel_proflink
