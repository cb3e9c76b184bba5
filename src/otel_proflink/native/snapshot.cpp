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
    proof->slot = thread.slot;
    if (thread.slot != nullptr) {
        const std::uint64_t done = thread.slot->done.load(std::memory_order_acquire);
        proof->attaches = thread.slot->begun.load(std::memory_order_acquire);
        // A slot changes hands when its thread ends; the thread may then still get another.
        proof->at_rest = done == proof->attaches &&
                         thread.slot->tid.load(std::memory_order_acquire) == thread.tid;
    } else {
        proof->attaches = attach_slots_assigned();
        proof->at_rest = proof->attaches == thread.assigned && !attach_slots_exhausted();
    }
}

void Snapshotter::parse_head(const unsigned char* raw, Head* head) noexcept {
    const ProflinkAbiThread& at = abi_.thread;
    head->interp = load<std::uintptr_t>(raw + at.interp);
    head->id = load<std::uint64_t>(raw + at.id);
    head->native_id = load<std::uint64_t>(raw + at.native_thread_id);
    head->frame = load<std::uintptr_t>(raw + at.frame);
    head->stack.chunk = load<std::uintptr_t>(raw + at.datastack_chunk);
    head->stack.top = load<std::uintptr_t>(raw + at.datastack_top);
    head->proof.context = load<std::uintptr_t>(raw + at.context);
    head->proof.context_ver = load<std::uint64_t>(raw + at.context_ver);
}

bool Snapshotter::read_head(const ThreadKey& thread, ThreadCache* cache, Head* head) noexcept {
    unsigned char raw[kMaxHead];
    if (abi_.thread.size > sizeof(raw)) return false;
    // CPython moves the pointer first and then the version. With the version read first here and
    // last in the second validation, an unchanged version proves the pointer's.
    std::uint64_t context_ver = 0;
    const ReadRequest requests[] = {
        {thread.tstate + abi_.thread.context_ver, &context_ver, sizeof(context_ver)},
        {thread.tstate, raw, abi_.thread.size},
    };
    if (!memory_.read(requests, 2)) return false;
    parse_head(raw, head);
    head->proof.context_ver = context_ver;
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
    const SnapshotResult result = attempt(thread, cache, chain, visitor);
    // Chunks of another size may come to lie at the same address.
    if (result == SnapshotResult::torn) cache->chunk = 0;
    return result;
}

bool Snapshotter::read_chain(const ThreadKey& thread, ThreadCache* cache, const Head& head,
                             const ReadRequest& also, Chain* chain) noexcept {
    StackRoot root{head.stack, thread.tstate, head.frame, cache->outer_cframe, 0};
    reader_.reset();
    bool walked = false;
    for (int copy = 0; copy < kCopies && !walked; ++copy) {
        std::uintptr_t leaf = 0;
        const FrameReader::Begin begun = reader_.begin(&root, &cache->scattered, also, &leaf);
        if (begun == FrameReader::Begin::failed) return false;
        if (begun == FrameReader::Begin::moved) continue;
        walked = walk(reader_, abi_, root, leaf, chain) && reader_.settled();
    }
    cache->outer_cframe = root.outer;
    return walked;
}

SnapshotResult Snapshotter::take_own(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
                                     Label* label) noexcept {
    Head head;
    *label = Label{};
    chain->count = chain->omitted = 0;
    if (!read_head(thread, cache, &head)) return SnapshotResult::torn;
    read_counters(thread, &head.proof);
    if (head.id != thread.id || head.interp != abi_.interpreter ||
        head.native_id != static_cast<std::uint64_t>(thread.tid)) {
        return SnapshotResult::gone;
    }
    std::uintptr_t variables = 0;
    ReadRequest also{0, nullptr, 0};
    const bool cached = head.proof.same(cache->proof);
    if (!cached && head.proof.context != 0) {
        also = {head.proof.context + abi_.context.context_vars, &variables, sizeof(variables)};
    }
    const bool walked = read_chain(thread, cache, head, also, chain);
    // Chunks of another size may come to lie at the same address.
    if (!walked) cache->chunk = 0;
    if (cached) {
        *label = cache->label;
    } else if (walked) {
        // In the middle of an attach as well: the variable has its old value or its new one.
        *label = read_label(memory_, abi_, key_, head.proof.context, variables);
        cache->proof = head.proof;
        cache->label = *label;
        if (label->state == LabelState::unknown) cache->proof.at_rest = false;
    }
    if (!walked) return SnapshotResult::torn;
    return chain->count == 0 ? SnapshotResult::no_frames : SnapshotResult::ok;
}

SnapshotResult Snapshotter::attempt(const ThreadKey& thread, ThreadCache* cache, Chain* chain,
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
    const std::uintptr_t variables_at = before.proof.context + abi_.context.context_vars;
    ReadRequest also{0, nullptr, 0};
    if (!cached && before.proof.context != 0) {
        also = {variables_at, &variables, sizeof(variables)};
    }
    if (!read_chain(thread, cache, before, also, chain)) return SnapshotResult::torn;
    LabelSource source;
    const Label label =
        cached ? cache->label
               : read_label(memory_, abi_, key_, before.proof.context, variables, &source);
    if (label.state == LabelState::unknown) return SnapshotResult::torn;
    if (visitor != nullptr && !visitor->visit(*chain)) return SnapshotResult::torn;
    if (also.size != 0 && label.state == LabelState::none) {
        // There is nothing to read again that would prove an absence: look once more.
        LabelSource ignored;
        std::uintptr_t again = 0;
        if (!memory_.read(variables_at, &again, sizeof(again)) || again != variables ||
            read_label(memory_, abi_, key_, before.proof.context, again, &ignored).state !=
                LabelState::none) {
            return SnapshotResult::torn;
        }
    }

    unsigned char raw[kMaxHead];
    std::uintptr_t variables_now = variables;
    LabelSource source_now = source;
    ReadRequest requests[4];
    int count = 0;
    // Another variable's set() frees the HAMT, and another thread may get its memory.
    if (also.size != 0) requests[count++] = {variables_at, &variables_now, sizeof(variables)};
    if (source.address != 0) {
        requests[count++] = {source.address, source_now.pair, sizeof(source_now.pair)};
    }
    if (source.task.address != 0) {
        requests[count++] = {source.task.address, source_now.task.pair,
                             sizeof(source_now.task.pair)};
    }
    requests[count++] = {thread.tstate, raw, abi_.thread.size};
    if (!reader_.recheck(*chain, requests, count)) return SnapshotResult::torn;
    if (visitor != nullptr) visitor->frames_proven();
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (variables_now != variables || !source_now.same(source)) return SnapshotResult::torn;
    Head after;
    parse_head(raw, &after);
    read_counters(thread, &after.proof);
    if (after.id != before.id || !after.proof.same(before.proof)) return SnapshotResult::torn;
    cache->proof = before.proof;
    cache->label = label;
    return chain->count == 0 ? SnapshotResult::no_frames : SnapshotResult::ok;
}

}  // namespace otel_proflink
