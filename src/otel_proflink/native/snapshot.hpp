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
    std::uint64_t attaches = 0;
    bool at_rest = false;  // no attach was under way

    bool same(const LabelProof& other) const noexcept {
        return at_rest && other.at_rest && context == other.context &&
               context_ver == other.context_ver && attaches == other.attaches;
    }
};

struct CachedLabel {
    LabelProof proof;
    Label label;
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

  protected:
    ~FrameVisitor() = default;
};

class Snapshotter {
  public:
    Snapshotter(Memory& memory, const ProflinkAbi& abi, const ContextKey& key) noexcept
        : memory_(memory), abi_(abi), key_(key), reader_(memory, abi) {}

    // One attempt. `cached` is the thread's last proven label and is kept up to date.
    SnapshotResult take(const ThreadKey& thread, CachedLabel* cached, Chain* chain,
                        FrameVisitor* visitor) noexcept;

  private:
    struct Head {
        std::uintptr_t interp;
        std::uint64_t id;
        std::uint64_t native_id;
        std::uintptr_t frame;  // or _PyCFrame
        std::uintptr_t leaf;
        DataStack stack;
        LabelProof proof;
    };

    // The leaf-side frames that the second read checks: while they stand unchanged, the callers
    // further down cannot have returned.
    static constexpr std::uint32_t kRecheckFrames = 64;

    static void read_counters(const ThreadKey& thread, LabelProof* proof) noexcept;
    bool read_head(const ThreadKey& thread, Head* head) noexcept;

    Memory& memory_;
    const ProflinkAbi& abi_;
    const ContextKey& key_;
    FrameReader reader_;
};

}  // namespace otel_proflink
