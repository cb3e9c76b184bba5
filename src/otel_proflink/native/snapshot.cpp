// SPDX-License-Identifier: Apache-2.0
//
// Order of reads, and why it proves the pair (frames, label):
//
//   1. slot counters, thread state (context, context_ver)
//   2. frames, as a chain that existed at one instant (see FrameReader)
//   3. label, unless the same proof has already given one; through the visitor the code objects
//   4. scattered frames again, thread state again, slot counters again
//
// An unchanged (context, context_ver, counters) means that no attach, detach, context switch or
// task switch happened between 1 and 4, there and back included: the counters and context_ver
// only grow. So whatever frames were seen in between, they ran under this one label. Addresses
// alone would prove nothing: they recycle.
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

void Snapshotter::parse_head(const unsigned char* raw, const ThreadKey& thread,
                             Head* head) noexcept {
    const ProflinkAbiThread& at = abi_.thread;
    head->interp = load<std::uintptr_t>(raw + at.interp);
    head->id = load<std::uint64_t>(raw + at.id);
    head->native_id = load<std::uint64_t>(raw + at.native_thread_id);
    head->leaf_at = at.has_cframe ? load<std::uintptr_t>(raw + at.frame) + at.cframe_frame
                                  : thread.tstate + at.frame;
    head->stack.chunk = load<std::uintptr_t>(raw + at.datastack_chunk);
    head->stack.top = load<std::uintptr_t>(raw + at.datastack_top);
    head->proof.context = load<std::uintptr_t>(raw + at.context);
    head->proof.context_ver = load<std::uint64_t>(raw + at.context_ver);
}

bool Snapshotter::read_head(const ThreadKey& thread, ThreadCache* cache, Head* head) noexcept {
    unsigned char raw[kMaxHead];
    if (abi_.thread.size > sizeof(raw) || !memory_.read(thread.tstate, raw, abi_.thread.size)) {
        return false;
    }
    parse_head(raw, thread, head);
    if (head->stack.chunk != cache->chunk) {
        cache->chunk = 0;
        if (head->stack.chunk != 0 &&
            !memory_.read(head->stack.chunk + abi_.frame.chunk_size, &cache->chunk_size,
                          sizeof(cache->chunk_size))) {
            return false;
        }
        cache->chunk = head->stack.chunk;
    }
    head->stack.size = cache->chunk_size;
    return true;
}

SnapshotResult Snapshotter::take(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
                                 FrameVisitor* visitor) noexcept {
    Head before;
    read_counters(thread, &before.proof);
    if (!before.proof.at_rest) return SnapshotResult::torn;
    std::atomic_thread_fence(std::memory_order_seq_cst);

    if (!read_head(thread, cache, &before)) return SnapshotResult::torn;
    if (before.id != thread.id || before.interp != abi_.interpreter ||
        before.native_id != static_cast<std::uint64_t>(thread.tid)) {
        return SnapshotResult::gone;
    }
    const bool cached =
        before.proof.same(cache->proof) && cache->label.state != LabelState::unknown;
    std::uintptr_t variables = 0;
    ReadRequest also{0, nullptr, 0};
    if (!cached && before.proof.context != 0) {
        also = {before.proof.context + abi_.context.context_vars, &variables, sizeof(variables)};
    }
    bool walked = false;
    for (int copy = 0; copy < kCopies && !walked; ++copy) {
        std::uintptr_t leaf = 0;
        if (!reader_.begin(before.stack, also, before.leaf_at, &leaf)) return SnapshotResult::torn;
        walked = walk(reader_, abi_, leaf, chain);
    }
    if (!walked) return SnapshotResult::torn;
    const Label label =
        cached ? cache->label : read_label(memory_, abi_, key_, before.proof.context, variables);
    if (label.state == LabelState::unknown) return SnapshotResult::torn;
    if (visitor != nullptr && !visitor->visit(*chain)) return SnapshotResult::torn;

    unsigned char raw[kMaxHead];
    const ReadRequest request{thread.tstate, raw, abi_.thread.size};
    if (!reader_.recheck(*chain, &request, 1)) return SnapshotResult::torn;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    Head after;
    parse_head(raw, thread, &after);
    read_counters(thread, &after.proof);
    if (after.id != before.id || !after.proof.same(before.proof)) return SnapshotResult::torn;
    cache->proof = before.proof;
    cache->label = label;
    return chain->count == 0 ? SnapshotResult::no_frames : SnapshotResult::ok;
}

}  // namespace otel_proflink
