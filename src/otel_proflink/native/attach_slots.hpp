// SPDX-License-Identifier: Apache-2.0
//
// One counter pair per thread that says when its OTel context changes. The sampler brackets its
// reads with them: equal and unchanged means that no attach or detach happened in between.
#pragma once

#include <atomic>
#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

// Written by its own thread only. `begun` moves before the change and `done` after it, and each
// nested change (a finaliser that attaches) moves both again, so "equal" means "at rest".
struct AttachSlot {
    std::atomic<std::uint64_t> begun;
    std::atomic<std::uint64_t> done;
    std::atomic<std::int32_t> tid;  // 0: free
    std::uint32_t next_free;
};

// More threads than a process can have in practice; 24 bytes each, touched only when used.
inline constexpr std::uint32_t kMaxAttachSlots = 65536;

// The calling thread's slot. Never nullptr: when all slots are taken, a shared one that no reader
// looks at. Not inlined: the thread-local variable is touched in one place (OTEP 4947's rule too).
PROFLINK_EXPORT AttachSlot* attach_slot() noexcept;

inline void attach_begin(AttachSlot* slot) noexcept {
    slot->begun.store(slot->begun.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
}

inline void attach_done(AttachSlot* slot) noexcept {
    slot->done.store(slot->done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

// Readers: slots [0, attach_slots_high()) of attach_slots() may be in use.
PROFLINK_EXPORT const AttachSlot* attach_slots() noexcept;
PROFLINK_EXPORT std::uint32_t attach_slots_high() noexcept;
// Slots ever handed out. While it stands still, a thread without a slot has attached nothing.
PROFLINK_EXPORT std::uint64_t attach_slots_assigned() noexcept;
// True once a thread had to share: a thread without a slot then proves nothing.
PROFLINK_EXPORT bool attach_slots_exhausted() noexcept;

// In a forked child: keeps the calling thread's slot under its new id, frees all others.
PROFLINK_EXPORT void attach_slots_after_fork() noexcept;

}  // namespace otel_proflink
