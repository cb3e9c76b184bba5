// SPDX-License-Identifier: Apache-2.0
//
// Order of reads, and why it proves the pair (frames, label):
//
//   1. slot counters, thread state (context, context_ver, leaf frame)
//   2. label, unless the same proof has already given one
//   3. frames, and through the visitor the code objects
//   4. frames again, thread state again, slot counters again
//
// An unchanged (context, context_ver, counters) means that no attach, detach, context switch or
// task switch happened between 1 and 4, there and back included: the counters and context_ver
// only grow. So whatever frames were seen in between, they ran under this one label. Step 4's
// frames show that the chain itself was not torn. Addresses alone prove neither: they recycle.
#include "snapshot.hpp"

#include <cstring>

namespace otel_proflink {
namespace {

template <typename T>
T load(const unsigned char* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// Upper bound of abi.thread.size over all supported versions.
constexpr std::uint32_t kMaxHead = 512;

}  // namespace

void Snapshotter::read_counters(const ThreadKey& thread, LabelProof* proof) noexcept {
    if (thread.slot != nullptr) {
        const std::uint64_t done = thread.slot->done.load(std::memory_order_acquire);
        proof->attaches = thread.slot->begun.load(std::memory_order_acquire);
        proof->at_rest = done == proof->attaches;
    } else {
        proof->attaches = attach_slots_assigned();
        proof->at_rest = proof->attaches == thread.assigned && !attach_slots_exhausted();
    }
}

bool Snapshotter::read_head(const ThreadKey& thread, Head* head) noexcept {
    unsigned char raw[kMaxHead];
    const ProflinkAbiThread& at = abi_.thread;
    if (at.size > sizeof(raw) || !memory_.read(thread.tstate, raw, at.size)) return false;
    head->interp = load<std::uintptr_t>(raw + at.interp);
    head->id = load<std::uint64_t>(raw + at.id);
    head->native_id = load<std::uint64_t>(raw + at.native_thread_id);
    head->frame = load<std::uintptr_t>(raw + at.frame);
    head->stack.chunk = load<std::uintptr_t>(raw + at.datastack_chunk);
    head->stack.top = load<std::uintptr_t>(raw + at.datastack_top);
    head->proof.context = load<std::uintptr_t>(raw + at.context);
    head->proof.context_ver = load<std::uint64_t>(raw + at.context_ver);
    head->leaf = head->frame;
    if (at.has_cframe) {
        return head->frame != 0 &&
               memory_.read(head->frame + at.cframe_frame, &head->leaf, sizeof(head->leaf));
    }
    return true;
}

SnapshotResult Snapshotter::take(const ThreadKey& thread, CachedLabel* cached, Chain* chain,
                                 FrameVisitor* visitor) noexcept {
    Head before;
    read_counters(thread, &before.proof);
    if (!before.proof.at_rest) return SnapshotResult::torn;
    std::atomic_thread_fence(std::memory_order_seq_cst);

    if (!read_head(thread, &before)) return SnapshotResult::torn;
    if (before.id != thread.id || before.interp != abi_.interpreter ||
        before.native_id != static_cast<std::uint64_t>(thread.tid)) {
        return SnapshotResult::gone;
    }
    Label label;
    if (before.proof.same(cached->proof) && cached->label.state != LabelState::unknown) {
        label = cached->label;
    } else {
        label = read_label(memory_, abi_, key_, before.proof.context);
        if (label.state == LabelState::unknown) return SnapshotResult::torn;
    }
    if (!walk(reader_, abi_, before.stack, before.leaf, chain)) return SnapshotResult::torn;
    if (visitor != nullptr && !visitor->visit(*chain)) return SnapshotResult::torn;

    if (!same_chain(reader_, before.stack, *chain, kRecheckFrames)) return SnapshotResult::torn;
    Head after;
    if (!read_head(thread, &after)) return SnapshotResult::torn;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    read_counters(thread, &after.proof);
    if (after.id != before.id || after.leaf != before.leaf || !after.proof.same(before.proof)) {
        return SnapshotResult::torn;
    }
    cached->proof = before.proof;
    cached->label = label;
    return chain->count == 0 ? SnapshotResult::no_frames : SnapshotResult::ok;
}

}  // namespace otel_proflink
