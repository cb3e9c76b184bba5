// SPDX-License-Identifier: Apache-2.0
//
// The chain of Python frames of one thread, by reads alone.
#pragma once

#include "abi.h"
#include "memory.hpp"

namespace otel_proflink {

struct Frame {
    std::uintptr_t address;
    std::uintptr_t code;
    std::uintptr_t previous;
    std::uintptr_t instruction;
    std::uint8_t owner;
    bool confirmed;  // read twice within about a microsecond, and found the same
    bool in_chunk;   // on the thread's data stack, where callers lie below what they called
};

// Frames kept of a stack: half from the leaf, half from the root. Deeper ones lose their middle,
// which says least about where time went and where it came from.
inline constexpr std::uint32_t kMaxFrames = 1024;
// A chain longer than this is taken for garbage (a cycle); CPython's default limit is 1000.
inline constexpr std::uint32_t kMaxWalk = 65536;

struct DataStack {
    std::uintptr_t chunk;  // the live chunk of the thread's data stack
    std::uintptr_t top;    // first unused byte in it
    std::uint64_t size;    // of the chunk, in bytes
};

struct Chain {
    Frame frames[kMaxFrames];  // Python frames only, leaf first
    std::uint32_t count = 0;
    std::uint32_t omitted = 0;  // frames between frames[kMaxFrames / 2 - 1] and the next one
};

// Reads frames, many at a time where they lie side by side.
//
// The newest part of the data stack, where frames come and go, is copied twice in one system call
// with the thread's leaf pointer between the copies. Frames that are equal in both were there at
// the instant in between, so that even a call-heavy thread shows a chain that really existed.
class FrameReader {
  public:
    FrameReader(Memory& memory, const ProflinkAbi& abi) noexcept : memory_(memory), abi_(abi) {}

    // Takes the two copies, `also` (size 0: nothing) and the leaf pointer at `leaf_at`.
    bool begin(const DataStack& stack, const ReadRequest& also, std::uintptr_t leaf_at,
               std::uintptr_t* leaf) noexcept;
    // False: unreadable, or different in the two copies. A leaf's instruction may differ.
    bool read(std::uintptr_t address, bool is_leaf, Frame* frame) noexcept;

    // Reads again the frames of `chain` that are not confirmed, and then `after`; false if one has
    // changed. Of a deep data stack only the newest few: while they stand, their callers do.
    bool recheck(const Chain& chain, const ReadRequest* after, int after_count) noexcept;

  private:
    // Upper bound of abi.frame.size over all supported versions.
    static constexpr std::uint32_t kMaxFrameSize = 128;
    // What is copied twice: some thirty frames. Deeper ones do not change while these stand.
    static constexpr std::uint32_t kHot = 4096;
    // Frames pushed since the thread state was read are still inside.
    static constexpr std::uint32_t kSlack = 1024;
    // The size of CPython's data stack chunks (DATA_STACK_CHUNK_SIZE); larger ones are rare.
    static constexpr std::uint32_t kWindow = 16384;
    static constexpr std::uint32_t kRecheck = 48;
    static constexpr std::uint32_t kRecheckInChunk = 8;

    struct Window {
        std::uintptr_t begin = 0;
        std::uintptr_t end = 0;
        bool holds(std::uintptr_t address, std::uint32_t size) const noexcept {
            return address >= begin && address + size <= end;
        }
    };

    Frame parse(std::uintptr_t address, const unsigned char* raw) const noexcept;
    const unsigned char* locate(std::uintptr_t address) noexcept;
    bool enter_chunk_of(std::uintptr_t address) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    std::uintptr_t chunk_ = 0;  // the chunk that frames are now read from, and its used part
    Window used_;
    Window hot_;
    Window cold_;
    unsigned char first_[kHot + kSlack];
    unsigned char second_[kHot + kSlack];
    unsigned char cold_bytes_[kWindow];
    unsigned char single_[kMaxFrameSize];
    unsigned char again_[kRecheck][kMaxFrameSize];
};

// Follows the chain from `leaf`. False: it is torn, or not a chain that the interpreter makes.
// The reader has begun on the thread's data stack.
bool walk(FrameReader& reader, const ProflinkAbi& abi, std::uintptr_t leaf, Chain* chain) noexcept;

}  // namespace otel_proflink
