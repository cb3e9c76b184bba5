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
};

// Frames kept of a stack: half from the leaf, half from the root. Deeper ones lose their middle,
// which says least about where time went and where it came from.
inline constexpr std::uint32_t kMaxFrames = 1024;
// A chain longer than this is taken for garbage (a cycle); CPython's default limit is 1000.
inline constexpr std::uint32_t kMaxWalk = 65536;

struct DataStack {
    std::uintptr_t chunk;  // the live chunk of the thread's data stack
    std::uintptr_t top;    // first unused byte in it
};

struct Chain {
    Frame frames[kMaxFrames];  // Python frames only, leaf first
    std::uint32_t count = 0;
    std::uint32_t omitted = 0;  // frames between frames[kMaxFrames / 2 - 1] and the next one
};

// Windows of a thread's data stack, so that one read serves many frames.
class FrameReader {
  public:
    FrameReader(Memory& memory, const ProflinkAbi& abi) noexcept : memory_(memory), abi_(abi) {}

    void begin(const DataStack& stack) noexcept;
    bool read(std::uintptr_t address, Frame* frame) noexcept;

  private:
    // The size of CPython's data stack chunks (DATA_STACK_CHUNK_SIZE); larger ones are rare.
    static constexpr std::uint32_t kWindow = 16384;

    const unsigned char* locate(std::uintptr_t address) noexcept;
    bool enter_chunk_of(std::uintptr_t address) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    std::uintptr_t chunk_ = 0;        // the chunk that frames are now read from
    std::uintptr_t chunk_begin_ = 0;  // its used part
    std::uintptr_t chunk_end_ = 0;
    std::uintptr_t begin_ = 0;  // what the buffer holds
    std::uintptr_t end_ = 0;
    unsigned char buffer_[kWindow];
    unsigned char single_[256];
};

// Follows the chain from `leaf`. False: it is torn, or not a chain that the interpreter makes.
bool walk(FrameReader& reader, const ProflinkAbi& abi, const DataStack& stack, std::uintptr_t leaf,
          Chain* chain) noexcept;

// Reads the frames of `chain` again, leaf first and at most `limit` of them: true if the same
// functions are still called from the same places. The leaf's instruction may have moved on.
bool same_chain(FrameReader& reader, const DataStack& stack, const Chain& chain,
                std::uint32_t limit) noexcept;

}  // namespace otel_proflink
