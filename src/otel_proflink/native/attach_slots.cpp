// SPDX-License-Identifier: Apache-2.0
#include "attach_slots.hpp"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace otel_proflink {
namespace {

constexpr std::uint32_t kNone = 0xffffffffu;

AttachSlot g_slots[kMaxAttachSlots];  // .bss: pages appear when touched
AttachSlot g_shared;
std::atomic<std::uint32_t> g_high{0};
std::atomic<std::uint64_t> g_assigned{0};
std::atomic<bool> g_exhausted{false};
std::atomic<std::uint64_t> g_free{kNone};  // low half index, high half a tag against ABA

pthread_key_t g_key;
pthread_once_t g_once = PTHREAD_ONCE_INIT;
thread_local AttachSlot* t_slot = nullptr;

std::int32_t gettid_now() noexcept { return static_cast<std::int32_t>(syscall(SYS_gettid)); }

void push_free(AttachSlot* slot) noexcept {
    slot->tid.store(0, std::memory_order_release);
    std::uint64_t head = g_free.load(std::memory_order_relaxed);
    std::uint64_t want;
    do {
        __atomic_store_n(&slot->next_free, static_cast<std::uint32_t>(head), __ATOMIC_RELAXED);
        want = ((head >> 32) + 1) << 32 | static_cast<std::uint32_t>(slot - g_slots);
    } while (!g_free.compare_exchange_weak(head, want, std::memory_order_acq_rel));
}

AttachSlot* take() noexcept {
    std::uint64_t head = g_free.load(std::memory_order_acquire);
    while (static_cast<std::uint32_t>(head) != kNone) {
        AttachSlot* slot = &g_slots[static_cast<std::uint32_t>(head)];
        const std::uint32_t next = __atomic_load_n(&slot->next_free, __ATOMIC_RELAXED);
        const std::uint64_t want = ((head >> 32) + 1) << 32 | next;
        if (g_free.compare_exchange_weak(head, want, std::memory_order_acq_rel)) return slot;
    }
    std::uint32_t high = g_high.load(std::memory_order_relaxed);
    do {
        if (high == kMaxAttachSlots) return nullptr;
    } while (!g_high.compare_exchange_weak(high, high + 1, std::memory_order_acq_rel));
    return &g_slots[high];
}

void on_thread_exit(void* slot) noexcept {
    t_slot = nullptr;
    push_free(static_cast<AttachSlot*>(slot));
}

void make_key() noexcept {
    pthread_key_create(&g_key, on_thread_exit);
    // Forks in C run no Python hook; this always runs, whether or not anything samples.
    pthread_atfork(nullptr, nullptr, attach_slots_after_fork);
}

__attribute__((noinline, cold)) AttachSlot* first_use() noexcept {
    pthread_once(&g_once, make_key);
    AttachSlot* slot = take();
    if (slot == nullptr) {
        g_exhausted.store(true, std::memory_order_release);
        return &g_shared;  // not kept: a slot may be free by the next attach
    }
    // Its last owner may have ended in the middle of an attach.
    slot->done.store(slot->begun.load(std::memory_order_relaxed), std::memory_order_relaxed);
    slot->tid.store(gettid_now(), std::memory_order_release);
    g_assigned.fetch_add(1, std::memory_order_acq_rel);  // before the attach that asked for it
    pthread_setspecific(g_key, slot);
    t_slot = slot;
    return slot;
}

}  // namespace

__attribute__((noinline)) AttachSlot* attach_slot() noexcept {
    AttachSlot* slot = t_slot;
    return slot != nullptr ? slot : first_use();
}

const AttachSlot* attach_slots() noexcept { return g_slots; }

std::uint32_t attach_slots_high() noexcept { return g_high.load(std::memory_order_acquire); }

std::uint64_t attach_slots_assigned() noexcept {
    return g_assigned.load(std::memory_order_acquire);
}

bool attach_slots_exhausted() noexcept { return g_exhausted.load(std::memory_order_acquire); }

void attach_slots_after_fork() noexcept {
    g_free.store(kNone, std::memory_order_relaxed);
    g_exhausted.store(false, std::memory_order_relaxed);
    const std::uint32_t high = g_high.load(std::memory_order_relaxed);
    for (std::uint32_t i = high; i-- > 0;) {
        AttachSlot* slot = &g_slots[i];
        if (slot == t_slot) {
            slot->tid.store(gettid_now(), std::memory_order_release);
        } else {
            push_free(slot);
        }
    }
}

}  // namespace otel_proflink
