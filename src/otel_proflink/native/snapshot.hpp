// SPDX-License-Identifier: Apache-2.0
//
// One validated observation of a thread that may be running: its frames and its label, proven to
// belong together, or nothing.
#pragma once

#include <atomic>

#include "abi.h"
#include "attach_slots.hpp"
#include "context.hpp"
#include "walk.hpp"

namespace otel_proflink {

struct ThreadKey {
    std::uintptr_t tstate;
    std::uint64_t id;  // PyThreadState.id: never reused, unlike addresses and thread ids
    std::int32_t tid;
    const AttachSlot* slot;  // nullptr: the thread had attached nothing when this was filled in,
    std::uint64_t assigned;  // which was while attach_slots_assigned() had this value
};

// What a label was read under. While all of it is unchanged, the label is unchanged: an attach or
// detach moves the slot's counters, and entering or leaving a context moves `context_ver`.
struct LabelProof {
    std::uintptr_t context = 0;
    std::uint64_t context_ver = 0;
    const AttachSlot* slot = nullptr;  // whose counter `attaches` is
    std::uint64_t attaches = 0;
    bool at_rest = false;  // no attach was under way

    bool same(const LabelProof& other) const noexcept {
        return at_rest && other.at_rest && context == other.context &&
               context_ver == other.context_ver && slot == other.slot && attaches == other.attaches;
    }
};

// What one thread's snapshots remember of the last one.
struct ThreadCache {
    LabelProof proof;
    Label label;
    std::uintptr_t chunk = 0;  // its live data stack chunk, and that chunk's size
    std::uint64_t chunk_size = 0;
    ScatteredFrames scattered;  // of its last chain
    std::uintptr_t outer_cframe = 0;
};

enum class SnapshotResult : std::uint8_t {
    ok,
    no_frames,  // the thread runs no Python code
    gone,       // the thread state is not this thread's any more
    torn,       // something changed while it was read: try again
};

// Gets to see the frames between the two validations, e.g. to read code objects while their
// frames keep them alive. False means torn.
class FrameVisitor {
  public:
    virtual bool visit(const Chain& chain) noexcept = 0;
    // The chain of the last visit() did exist, at an instant between two reports of dead code
    // objects. Its label may still turn out to be unknown.
    virtual void frames_proven() noexcept {}

  protected:
    ~FrameVisitor() = default;
};

class Snapshotter {
  public:
    Snapshotter(Memory& memory, const ProflinkAbi& abi, const ContextKey& key) noexcept
        : memory_(memory), abi_(abi), key_(key), reader_(memory, abi) {}

    // One attempt. `cache` is the thread's own and is kept up to date.
    SnapshotResult take(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
                        FrameVisitor* visitor) noexcept;

    // Of the calling thread, within a signal handler: it stands still, so what is read once belongs
    // together. `torn`: it was interrupted where the interpreter has a frame half made.
    SnapshotResult take_own(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
                            Label* label) noexcept;

  private:
    struct Head {
        std::uintptr_t interp;
        std::uint64_t id;
        std::uint64_t native_id;
        std::uintptr_t frame;  // the current frame, or the _PyCFrame that holds it
        DataStack stack;
        LabelProof proof;
    };

    // Times that the two copies of the data stack are taken before the attempt is given up: a
    // copy is cheap, and what they have to agree on is short-lived only in call-heavy code.
    static constexpr int kCopies = 6;
    // Upper bound of abi.thread.size over all supported versions.
    static constexpr std::uint32_t kMaxHead = 512;

    static void read_counters(const ThreadKey& thread, LabelProof* proof) noexcept;
    SnapshotResult attempt(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
                           FrameVisitor* visitor) noexcept;
    bool read_chain(const ThreadKey& thread, ThreadCache* cache, const Head& head,
                    const ReadRequest& also, Chain* chain) noexcept;
    void parse_head(const unsigned char* raw, Head* head) noexcept;
    bool read_head(const ThreadKey& thread, ThreadCache* cache, Head* head) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    const ContextKey& key_;
    FrameReader reader_;
};

}  // namespace otel_proflink
