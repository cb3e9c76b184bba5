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

bool FrameReader::begin(const DataStack& stack, const ReadRequest& also, std::uintptr_t leaf_at,
                        std::uintptr_t* leaf) noexcept {
    chunk_ = stack.chunk;
    used_ = {};
    hot_ = cold_ = {};
    ReadRequest requests[4];
    int count = 0;
    if (also.size != 0) requests[count++] = also;
    if (stack.chunk != 0 && stack.top > stack.chunk && stack.top - stack.chunk <= stack.size) {
        used_ = {stack.chunk + abi_.frame.chunk_data, stack.top};
        hot_.begin = stack.top - used_.begin > kHot ? stack.top - kHot : used_.begin;
        hot_.end = std::min<std::uintptr_t>(stack.top + kSlack, stack.chunk + stack.size);
        used_.end = hot_.end;
    }
    const auto size = static_cast<std::uint32_t>(hot_.end - hot_.begin);
    if (size != 0) requests[count++] = {hot_.begin, first_, size};
    requests[count++] = {leaf_at, leaf, sizeof(*leaf)};
    if (size != 0) requests[count++] = {hot_.begin, second_, size};
    return memory_.read(requests, count);
}

// Frames of a thread lie in its chunks from the newest to the oldest, so a frame that is not in
// this chunk lies in an older one, or outside the data stack altogether.
bool FrameReader::enter_chunk_of(std::uintptr_t address) noexcept {
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
            used_ = {data, data + top * sizeof(void*)};
            return true;
        }
        chunk = previous;
    }
    return false;
}

const unsigned char* FrameReader::locate(std::uintptr_t address) noexcept {
    const std::uint32_t size = abi_.frame.size;
    if (cold_.holds(address, size)) return cold_bytes_ + (address - cold_.begin);
    if (!used_.holds(address, size)) {
        // Generator frames and entry shims live elsewhere, each on its own.
        if (size > sizeof(single_) || !memory_.read(address, single_, size)) return nullptr;
        if (single_[abi_.frame.owner] != 0 || !enter_chunk_of(address)) return single_;
        if (!used_.holds(address, size)) return nullptr;
    }
    // What this chunk holds below the frame is its callers.
    const std::uintptr_t end = address + size;
    const std::uintptr_t begin = end - used_.begin > kWindow ? end - kWindow : used_.begin;
    if (!memory_.read(begin, cold_bytes_, static_cast<std::uint32_t>(end - begin))) {
        return nullptr;
    }
    cold_ = {begin, end};
    return cold_bytes_ + (address - begin);
}

Frame FrameReader::parse(std::uintptr_t address, const unsigned char* raw) const noexcept {
    Frame frame;
    frame.address = address;
    frame.code = load<std::uintptr_t>(raw + abi_.frame.code);
    frame.previous = load<std::uintptr_t>(raw + abi_.frame.previous);
    frame.instruction = load<std::uintptr_t>(raw + abi_.frame.instruction);
    frame.owner = raw[abi_.frame.owner];
    frame.confirmed = false;
    frame.in_chunk = false;
    return frame;
}

bool FrameReader::read(std::uintptr_t address, bool is_leaf, Frame* frame) noexcept {
    if (!plausible(address)) return false;
    if (hot_.holds(address, abi_.frame.size)) {
        *frame = parse(address, first_ + (address - hot_.begin));
        const Frame second = parse(address, second_ + (address - hot_.begin));
        frame->confirmed = true;
        return frame->code == second.code && frame->previous == second.previous &&
               frame->owner == second.owner &&
               (is_leaf || frame->instruction == second.instruction);
    }
    const unsigned char* raw = locate(address);
    if (raw == nullptr) return false;
    *frame = parse(address, raw);
    frame->in_chunk = used_.holds(address, abi_.frame.size);
    return true;
}

bool FrameReader::recheck(const Chain& chain, const ReadRequest* after, int after_count) noexcept {
    ReadRequest requests[kRecheck + 4];
    const Frame* checked[kRecheck];
    std::uint32_t count = 0;
    std::uint32_t in_chunk = 0;
    for (std::uint32_t i = 0; i < chain.count && count < kRecheck; ++i) {
        if (chain.frames[i].confirmed) continue;
        if (chain.frames[i].in_chunk && ++in_chunk > kRecheckInChunk) continue;
        checked[count] = &chain.frames[i];
        requests[count] = {chain.frames[i].address, again_[count], abi_.frame.size};
        ++count;
    }
    for (int i = 0; i < after_count; ++i)
        requests[count + static_cast<std::uint32_t>(i)] = after[i];
    if (!memory_.read(requests, static_cast<int>(count) + after_count)) return false;
    for (std::uint32_t i = 0; i < count; ++i) {
        const Frame now = parse(checked[i]->address, again_[i]);
        if (now.code != checked[i]->code || now.previous != checked[i]->previous ||
            now.owner != checked[i]->owner) {
            return false;
        }
    }
    return true;
}

bool walk(FrameReader& reader, const ProflinkAbi& abi, std::uintptr_t leaf, Chain* chain) noexcept {
    chain->count = 0;
    chain->omitted = 0;
    std::uint32_t total = 0;
    std::uint8_t last_owner = 0;
    std::uintptr_t address = leaf;
    for (std::uint32_t steps = 0; address != 0; ++steps) {
        if (steps == kMaxWalk) return false;
        Frame frame;
        if (!reader.read(address, steps == 0, &frame) || frame.owner > abi.frame.owner_last ||
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

}  // namespace otel_proflink
