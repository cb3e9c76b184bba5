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

// No user address has any of the top bits, so that adding sizes to one never wraps.
constexpr std::uintptr_t kMaxAddress = std::uintptr_t{1} << 56;

bool plausible(std::uintptr_t address) noexcept {
    return address != 0 && address < kMaxAddress && address % sizeof(void*) == 0;
}

}  // namespace

FrameReader::Begin FrameReader::begin(StackRoot* root, ScatteredFrames* scattered,
                                      const ReadRequest& also, std::uintptr_t* leaf) noexcept {
    const DataStack& stack = root->stack;
    chunk_ = stack.chunk;
    used_ = hot_ = {};
    fresh_ = false;
    known_ = *scattered;
    met_ = scattered;
    met_->count = 0;
    int count = 0;
    // The thread must be in the _PyCFrame that is read before the first copy and after the last.
    std::uintptr_t cframe_before = root->cframe;
    if (abi_.thread.has_cframe) {
        requests_[count++] = {root->tstate + abi_.thread.frame, &cframe_before,
                              sizeof(cframe_before)};
    }
    if (also.size != 0) requests_[count++] = also;
    for (std::uint32_t i = 0; i < known_.count; ++i) {
        requests_[count++] = {known_.addresses[i], known_first_[i], abi_.frame.size};
    }
    if (plausible(stack.chunk) && plausible(stack.top) && stack.size <= kMaxChunkSize &&
        stack.top >= stack.chunk + abi_.frame.chunk_data && stack.top - stack.chunk <= stack.size) {
        const std::uint64_t free = stack.size - (stack.top - stack.chunk);
        used_ = {stack.chunk + abi_.frame.chunk_data,
                 stack.top + std::min<std::uint64_t>(free, kSlack)};
        hot_.begin = stack.top - used_.begin > kHot ? stack.top - kHot : used_.begin;
        hot_.end = used_.end;
    }
    const auto size = static_cast<std::uint32_t>(hot_.end - hot_.begin);
    std::uintptr_t cframe = root->cframe;
    std::uintptr_t loop[2] = {0, root->outer};  // of the _PyCFrame: current_frame, previous
    if (size != 0) requests_[count++] = {hot_.begin, first_, size};
    std::uintptr_t top_before = stack.top;
    std::uintptr_t top_after = stack.top;
    if (abi_.thread.has_cframe) {
        const std::uintptr_t top_at = root->tstate + abi_.thread.datastack_top;
        requests_[count++] = {top_at, &top_before, sizeof(top_before)};
        requests_[count++] = {root->cframe + abi_.thread.cframe_frame, loop, sizeof(loop)};
        requests_[count++] = {top_at, &top_after, sizeof(top_after)};
        if (root->outer != 0) {
            requests_[count++] = {root->outer + abi_.thread.cframe_frame, &root->outer_frame,
                                  sizeof(root->outer_frame)};
        }
    } else {
        requests_[count++] = {root->tstate + abi_.thread.frame, leaf, sizeof(*leaf)};
    }
    if (size != 0) requests_[count++] = {hot_.begin, second_, size};
    for (std::uint32_t i = 0; i < known_.count; ++i) {
        requests_[count++] = {known_.addresses[i], known_second_[i], abi_.frame.size};
    }
    // A _PyCFrame that the thread has left still holds a frame, but not a live one.
    if (abi_.thread.has_cframe) {
        requests_[count++] = {root->tstate + abi_.thread.frame, &cframe, sizeof(cframe)};
    }
    if (!memory_.read(requests_, count)) {
        // What is only remembered may be gone with its memory.
        const bool remembered = known_.count != 0 || root->outer != 0;
        root->outer = 0;
        return remembered ? Begin::moved : Begin::failed;
    }
    if (abi_.thread.has_cframe) {
        *leaf = loop[0];
        if (root->outer == 0) root->outer_frame = 0;
        // A _PyCFrame that is not filled in yet may hold a frame that is popped.
        const bool popped =
            hot_.holds(*leaf, abi_.frame.size) && *leaf >= std::min(top_before, top_after);
        if (popped || cframe_before != root->cframe || cframe != root->cframe ||
            loop[1] != root->outer) {
            root->cframe = cframe;
            root->outer = loop[1];
            *met_ = known_;
            return Begin::moved;
        }
    }
    return Begin::ok;
}

// Frames of a thread lie in its chunks from the newest to the oldest, so a frame that is not in
// this chunk lies in an older one, or is not a live frame.
bool FrameReader::chunk_of(std::uintptr_t address, Window* used) noexcept {
    std::uintptr_t chunk = chunk_;
    for (int i = 0; i < kMaxChunks && plausible(chunk); ++i) {
        std::uintptr_t previous = 0;
        if (!memory_.read(chunk + abi_.frame.chunk_previous, &previous, sizeof(previous))) {
            return false;
        }
        if (!plausible(previous)) return false;
        unsigned char header[64];
        if (abi_.frame.chunk_data > sizeof(header) ||
            !memory_.read(previous, header, abi_.frame.chunk_data)) {
            return false;
        }
        const auto size = load<std::uint64_t>(header + abi_.frame.chunk_size);
        const auto top = load<std::uint64_t>(header + abi_.frame.chunk_top);
        // `top` counts pointers used; it is exact in every chunk but the live one.
        const std::uintptr_t data = previous + abi_.frame.chunk_data;
        if (size <= kMaxChunkSize && top <= size / sizeof(void*) && address >= data &&
            address - data < top * sizeof(void*)) {
            *used = {data, data + top * sizeof(void*)};
            chunk_ = previous;
            return true;
        }
        chunk = previous;
    }
    return false;
}

// What the chunk holds below the frame is its callers.
const unsigned char* FrameReader::open_window(const Window& used, std::uintptr_t address) noexcept {
    const std::uint32_t size = abi_.frame.size;
    if (!used.holds(address, size)) return nullptr;
    const std::uintptr_t end = address + size;
    const std::uintptr_t begin = end - used.begin > kWindow ? end - kWindow : used.begin;
    const std::uint32_t place = windows_ < kWindows ? windows_ : kWindows;
    cold_[place] = {};
    if (!memory_.read(begin, cold_bytes_[place], static_cast<std::uint32_t>(end - begin))) {
        return nullptr;
    }
    cold_[place] = {begin, end};
    if (windows_ < kWindows) fresh_ = true;
    windows_ = std::min(windows_ + 1, kWindows + 1);
    return cold_bytes_[place] + (address - begin);
}

const unsigned char* FrameReader::locate(std::uintptr_t address) noexcept {
    const std::uint32_t size = abi_.frame.size;
    for (std::uint32_t i = 0; i < windows_; ++i) {
        if (cold_[i].holds(address, size)) return cold_bytes_[i] + (address - cold_[i].begin);
    }
    if (used_.holds(address, size)) return open_window(used_, address);
    if (size > sizeof(single_) || !memory_.read(address, single_, size)) return nullptr;
    if (single_[abi_.frame.owner] == 0) {
        Window used;
        return chunk_of(address, &used) ? open_window(used, address) : nullptr;
    }
    // Callers of this many scattered frames cannot change within a snapshot either.
    if (met_->count < ScatteredFrames::kMax) {
        met_->addresses[met_->count++] = address;
        fresh_ = true;
    }
    return single_;
}

Frame FrameReader::parse(std::uintptr_t address, const unsigned char* raw) const noexcept {
    Frame frame;
    frame.address = address;
    frame.code = load<std::uintptr_t>(raw + abi_.frame.code) & abi_.frame.code_mask;
    frame.previous = load<std::uintptr_t>(raw + abi_.frame.previous);
    frame.instruction = load<std::uintptr_t>(raw + abi_.frame.instruction);
    frame.copy = load<std::int32_t>(raw + abi_.frame.copy);
    frame.owner = raw[abi_.frame.owner];
    frame.confirmed = false;
    return frame;
}

bool FrameReader::read_twice(std::uintptr_t address, const unsigned char* first,
                             const unsigned char* second, bool is_leaf,
                             Frame* frame) const noexcept {
    *frame = parse(address, first);
    frame->confirmed = true;
    const Frame again = parse(address, second);
    return frame->code == again.code && frame->previous == again.previous &&
           frame->owner == again.owner && (is_leaf || frame->instruction == again.instruction);
}

bool FrameReader::read(std::uintptr_t address, bool is_leaf, Frame* frame) noexcept {
    if (!plausible(address)) return false;
    if (hot_.holds(address, abi_.frame.size)) {
        return read_twice(address, first_ + (address - hot_.begin),
                          second_ + (address - hot_.begin), is_leaf, frame);
    }
    for (std::uint32_t i = 0; i < known_.count; ++i) {
        if (known_.addresses[i] != address) continue;
        if (met_->count < ScatteredFrames::kMax) met_->addresses[met_->count++] = address;
        return read_twice(address, known_first_[i], known_second_[i], is_leaf, frame);
    }
    const unsigned char* raw = locate(address);
    if (raw == nullptr) return false;
    *frame = parse(address, raw);
    return true;
}

bool FrameReader::recheck(const Chain& chain, const ReadRequest* after, int after_count) noexcept {
    struct Run {
        std::uint32_t first, end;  // frames of the chain
    };
    const std::uint32_t size = abi_.frame.size;
    std::uint32_t next = 0;
    do {
        ReadRequest requests[kRecheck + 4];
        Run runs[kRecheck];
        std::uint32_t count = 0;
        std::uint32_t used = 0;
        while (next < chain.count && count < kRecheck && used + size <= sizeof(again_)) {
            const Frame* frame = &chain.frames[next];
            if (frame->confirmed) {
                ++next;
                continue;
            }
            const std::uintptr_t end = frame->address + size;
            Run& run = runs[count] = {next, next + 1};
            for (; run.end < chain.count; ++run.end) {
                const Frame& caller = chain.frames[run.end];
                if (caller.confirmed || caller.address >= frame->address ||
                    frame->address - caller.address > kMaxGap ||
                    end - caller.address > sizeof(again_) - used) {
                    break;
                }
                frame = &caller;
            }
            const auto length = static_cast<std::uint32_t>(end - frame->address);
            requests[count++] = {frame->address, again_ + used, length};
            used += length;
            next = run.end;
        }
        const std::uint32_t own = count;
        for (int i = 0; next == chain.count && i < after_count; ++i) requests[count++] = after[i];
        if (!memory_.read(requests, static_cast<int>(count))) return false;
        for (std::uint32_t i = 0; i < own; ++i) {
            const auto* bytes = static_cast<const unsigned char*>(requests[i].into);
            for (std::uint32_t k = runs[i].first; k < runs[i].end; ++k) {
                const Frame& was = chain.frames[k];
                const Frame now = parse(was.address, bytes + (was.address - requests[i].address));
                if (now.code != was.code || now.previous != was.previous ||
                    now.owner != was.owner) {
                    return false;
                }
            }
        }
    } while (next < chain.count);
    return true;
}

bool walk(FrameReader& reader, const ProflinkAbi& abi, const StackRoot& root, std::uintptr_t leaf,
          Chain* chain) noexcept {
    chain->count = 0;
    chain->omitted = 0;
    std::uint32_t total = 0;
    std::uint8_t last_owner = 0;
    // 3.11 and 3.12 point the thread at a new _PyCFrame a few instructions before they fill in its
    // frame: until then it holds what the C stack held. What tells is whether the chain goes
    // through the frame that entered the interpreter loop, right after the first shim if any.
    bool entered = !abi.thread.has_cframe || (leaf == 0 && root.outer_frame == 0);
    if (leaf == 0 && !entered) return false;
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
        if (!entered && address == root.outer_frame) {
            entered = abi.frame.owner_shim == PROFLINK_ABI_NO_OWNER ||
                      frame.owner >= abi.frame.owner_shim;
        }
        if (!entered && frame.owner >= abi.frame.owner_shim) return false;
        if (frame.owner >= abi.frame.owner_shim) continue;  // entry shim: not Python code
        if (!plausible(frame.code)) return false;
        const std::uint32_t place = total < kMaxFrames ? total : kHalf + (total - kHalf) % kHalf;
        chain->frames[place] = frame;
        ++total;
    }
    // Every thread's outermost frame is entered from C: up to 3.11 that is an ordinary function,
    // from 3.12 on an entry shim. `yield` clears a generator's link, so that a torn chain may end
    // early but looks whole: it then ends elsewhere.
    if (leaf != 0) {
        const bool at_root = abi.frame.owner_shim != PROFLINK_ABI_NO_OWNER
                                 ? last_owner >= abi.frame.owner_shim
                                 : last_owner != abi.frame.owner_generator;
        if (!at_root || !entered) return false;
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
