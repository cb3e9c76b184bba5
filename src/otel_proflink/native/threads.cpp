// SPDX-License-Identifier: Apache-2.0
#include "threads.hpp"

#include <cstring>
#include <new>

namespace otel_proflink {
namespace {

template <typename T>
T load(const unsigned char* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

}  // namespace

void ThreadList::ignore(std::int32_t tid, bool ignore) noexcept {
    if (ignore && ignored(tid)) return;
    for (auto& place : ignored_) {
        std::int32_t expected = ignore ? 0 : tid;
        if (place.compare_exchange_strong(expected, ignore ? tid : 0)) return;
    }
}

void ThreadList::ignore_none() noexcept {
    for (auto& place : ignored_) place.store(0, std::memory_order_relaxed);
}

bool ThreadList::ignored(std::int32_t tid) const noexcept {
    for (const auto& place : ignored_) {
        if (place.load(std::memory_order_relaxed) == tid) return true;
    }
    return false;
}

SampledThread* ThreadList::find(std::uintptr_t tstate, std::uint64_t id) noexcept {
    for (std::uint32_t i = 0; i < size_; ++i) {
        if (threads_[i].key.tstate == tstate && threads_[i].key.id == id) return &threads_[i];
    }
    return nullptr;
}

bool ThreadList::runs_already(std::int32_t tid) const noexcept {
    for (std::uint32_t i = 0; i < size_; ++i) {
        if (threads_[i].key.tid == tid) return true;
    }
    return false;
}

void ThreadList::remove(std::uint32_t index) noexcept {
    threads_[index].state_file.close();
    threads_[index].timer.close();
    if (index != size_ - 1) threads_[index] = threads_[size_ - 1];
    --size_;
}

void ThreadList::clear() noexcept {
    while (size_ != 0) remove(size_ - 1);
    head_ = 0;
    next_id_ = 0;
    assigned_ = 0;
}

std::uint32_t ThreadList::open_files() const noexcept {
    std::uint32_t count = 0;
    for (std::uint32_t i = 0; i < size_; ++i) count += threads_[i].state_file.is_open() ? 1 : 0;
    return count;
}

void ThreadList::refresh(std::uint64_t tick, std::uint64_t now_ns, std::uint64_t period_ns,
                         bool first) noexcept {
    // The head first: a thread state that comes between the two is seen by its number next time.
    const std::uintptr_t head =
        runtime_word(abi_.interpreter + abi_.interpreter_state.threads_head);
    const std::uint64_t next_id =
        runtime_word(abi_.interpreter + abi_.interpreter_state.threads_next_id);
    const bool whole = first || distrusted_ || tick % kWalkEvery == 0;
    if (whole || head != head_ || next_id != next_id_) {
        // The list changes while it is read: what was torn is looked at again next tick.
        if (walk(now_ns, period_ns, first, whole)) {
            head_ = head;
            next_id_ = next_id;
            if (whole) distrusted_ = false;
        }
    }
    resolve_slots();
}

// New thread states are linked in at the head, so a partial walk ends at the first known one.
bool ThreadList::walk(std::uint64_t now_ns, std::uint64_t period_ns, bool first,
                      bool whole) noexcept {
    std::uintptr_t at = 0;
    if (!memory_.read(abi_.interpreter + abi_.interpreter_state.threads_head, &at, sizeof(at))) {
        return false;
    }
    bool complete = true;
    const std::uint32_t known = size_;
    bool seen[512] = {};  // enough: an ended state of a later thread goes when its clock moves
    std::uintptr_t previous = 0;
    for (std::uint32_t steps = 0; at != 0; ++steps) {
        unsigned char raw[512];
        if (steps == kMaxThreads || abi_.thread.size > sizeof(raw) ||
            !memory_.read(at, raw, abi_.thread.size) ||
            load<std::uintptr_t>(raw + abi_.thread.interp) != abi_.interpreter ||
            load<std::uintptr_t>(raw + abi_.thread.prev) != previous) {
            return false;
        }
        const auto id = load<std::uint64_t>(raw + abi_.thread.id);
        const auto tid =
            static_cast<std::int32_t>(load<std::uint64_t>(raw + abi_.thread.native_thread_id));
        SampledThread* thread = find(at, id);
        if (thread != nullptr && !whole) return complete;
        if (tid == 0) complete = false;  // made, but its thread does not run yet
        if (thread != nullptr) {
            const auto index = static_cast<std::uint32_t>(thread - &threads_[0]);
            if (index < sizeof(seen)) seen[index] = true;
        } else if (tid != 0 && runs_already(tid)) {
            // Up to 3.11 a new thread state carries its maker's thread id until its own thread
            // runs; or an ended state's thread has made another. Either way: look again.
            complete = false;
            distrusted_ = true;
        } else if (tid != 0 && size_ < kMaxThreads && !ignored(tid)) {
            thread = new (&threads_[size_]) SampledThread();
            thread->key = ThreadKey{at, id, tid, nullptr, 0};
            thread->polled_ns = first ? now_ns : now_ns - period_ns;
            if (!first || thread_cpu_ns(tid, &thread->cpu_ns)) ++size_;
            assigned_ = 0;  // its slot is to be found
        }
        previous = at;
        at = load<std::uintptr_t>(raw + abi_.thread.next);
    }
    if (whole) {
        for (std::uint32_t i = known; i-- > 0;) {
            if (i < sizeof(seen) && !seen[i]) remove(i);
        }
    }
    return complete;
}

void ThreadList::resolve_slots() noexcept {
    const std::uint64_t assigned = attach_slots_assigned();
    if (assigned == assigned_) return;
    const AttachSlot* slots = attach_slots();
    const std::uint32_t high = attach_slots_high();
    for (std::uint32_t i = 0; i < size_; ++i) {
        ThreadKey& key = threads_[i].key;
        key.assigned = assigned;
        if (key.slot != nullptr && key.slot->tid.load(std::memory_order_acquire) == key.tid) {
            continue;
        }
        key.slot = nullptr;
        for (std::uint32_t k = 0; k < high; ++k) {
            if (slots[k].tid.load(std::memory_order_acquire) == key.tid) {
                key.slot = &slots[k];
                break;
            }
        }
    }
    assigned_ = assigned;
}

}  // namespace otel_proflink
