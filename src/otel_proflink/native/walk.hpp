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
    bool confirmed;         // read twice within about a microsecond, and found the same
    std::int32_t copy = 0;  // which copy of its code's instructions it runs, where there are any
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

// Frames that lie outside the data stack, each on its own: generators' frames and entry shims.
// Where they were is remembered, so that the next copy can hold them too.
struct ScatteredFrames {
    static constexpr std::uint32_t kMax = 24;
    std::uintptr_t addresses[kMax];
    std::uint32_t count = 0;
};

// Where a thread's chain of frames begins.
struct StackRoot {
    DataStack stack;
    std::uintptr_t tstate;
    std::uintptr_t cframe;       // what the thread state last showed; unused where that is the leaf
    std::uintptr_t outer;        // the _PyCFrame before it, as last seen; 0: not known, or none
    std::uintptr_t outer_frame;  // out: the frame that entered this _PyCFrame's interpreter loop
};

// Reads frames, many at a time where they lie side by side.
//
// The newest part of the data stack and the scattered frames known so far are copied twice in one
// system call, with the thread's leaf pointer between the copies. Frames that are equal in both
// were there at the instant in between, so that even a call-heavy thread shows a chain that really
// existed. A frame that the copies do not hold is read on its own, which proves nothing yet: it
// must have been read before a later round's leaf pointer, and be the same after it.
class FrameReader {
  public:
    enum class Begin : std::uint8_t {
        ok,
        moved,   // the thread went on to another _PyCFrame, now in `root`, or the like: try again
        failed,  // unreadable
    };

    FrameReader(Memory& memory, const ProflinkAbi& abi) noexcept : memory_(memory), abi_(abi) {}

    // A new attempt: forgets what was read on its own.
    void reset() noexcept { windows_ = 0; }
    // Takes the two copies, `also` (size 0: nothing) and the leaf pointer.
    Begin begin(StackRoot* root, ScatteredFrames* scattered, const ReadRequest& also,
                std::uintptr_t* leaf) noexcept;
    // False: unreadable, or different in the two copies. A leaf's instruction may differ.
    bool read(std::uintptr_t address, bool is_leaf, Frame* frame) noexcept;
    // True if all that was read since begin() had also been read before it.
    bool settled() const noexcept { return !fresh_; }

    // Reads again the frames of `chain` that are not confirmed, and then `after`; false if one has
    // changed. All of them: that the newest stand does not mean that their callers did. While the
    // sampler was kept from its CPU, a thread may have returned from all of a deep recursion,
    // called something else, and gone down again by the same frames.
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
    // Windows kept from round to round. What lies deeper cannot change within a snapshot: all of
    // this would have to return first.
    static constexpr std::uint32_t kWindows = 4;
    static constexpr std::uint32_t kRecheck = 48;
    // Beyond this a chunk's size is not one: a frame would have to hold millions of locals.
    static constexpr std::uint64_t kMaxChunkSize = 1u << 30;
    // Frames no further apart than this are read as one: no page that is not there lies between.
    static constexpr std::uint32_t kMaxGap = 2048;

    struct Window {
        std::uintptr_t begin = 0;
        std::uintptr_t end = 0;
        bool holds(std::uintptr_t address, std::uint32_t size) const noexcept {
            return address >= begin && address < end && size <= end - address;
        }
    };

    Frame parse(std::uintptr_t address, const unsigned char* raw) const noexcept;
    bool read_twice(std::uintptr_t address, const unsigned char* first, const unsigned char* second,
                    bool is_leaf, Frame* frame) const noexcept;
    const unsigned char* locate(std::uintptr_t address) noexcept;
    const unsigned char* open_window(const Window& used, std::uintptr_t address) noexcept;
    bool chunk_of(std::uintptr_t address, Window* used) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    std::uintptr_t chunk_ = 0;  // where to look for older chunks from
    Window used_;               // part of the live chunk
    Window hot_;
    Window cold_[kWindows + 1];  // the last one is for what lies deeper still
    std::uint32_t windows_ = 0;
    bool fresh_ = false;
    ScatteredFrames known_;  // what the copies hold
    ScatteredFrames* met_ = nullptr;
    ReadRequest requests_[2 * ScatteredFrames::kMax + 10];  // not on a signal handler's stack
    unsigned char first_[kHot + kSlack];
    unsigned char second_[kHot + kSlack];
    unsigned char known_first_[ScatteredFrames::kMax][kMaxFrameSize];
    unsigned char known_second_[ScatteredFrames::kMax][kMaxFrameSize];
    unsigned char cold_bytes_[kWindows + 1][kWindow];
    unsigned char single_[kMaxFrameSize];
    unsigned char again_[kWindow];
};

// Follows the chain from `leaf`. False: it is torn, or not a chain that the interpreter makes.
// The reader has begun on the thread's data stack, at `root`.
bool walk(FrameReader& reader, const ProflinkAbi& abi, const StackRoot& root, std::uintptr_t leaf,
          Chain* chain) noexcept;

}  // namespace otel_proflink
