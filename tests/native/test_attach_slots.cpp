// SPDX-License-Identifier: Apache-2.0
//
// One counter pair per thread; slots come back when threads end, and after a fork.
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <thread>
#include <vector>

#include "attach_slots.hpp"
#include "support/effort.hpp"

namespace otel_proflink::test {
namespace {

std::int32_t tid_now() { return static_cast<std::int32_t>(syscall(SYS_gettid)); }

std::uint32_t slots_in_use() {
    std::uint32_t count = 0;
    for (std::uint32_t i = 0; i < attach_slots_high(); ++i) {
        count += attach_slots()[i].tid.load() != 0 ? 1 : 0;
    }
    return count;
}

// Runs `child` in a forked process; true if it returns true.
bool forked(bool (*child)()) {
    const pid_t pid = fork();
    if (pid == 0) _exit(child() ? 0 : 1);
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(AttachSlots, OneForEachThread) {
    AttachSlot* mine = attach_slot();
    EXPECT_EQ(attach_slot(), mine);
    EXPECT_EQ(mine->tid.load(), tid_now());
    EXPECT_GE(mine, attach_slots());
    EXPECT_LT(mine, attach_slots() + attach_slots_high());
    AttachSlot* other = nullptr;
    std::thread([&] {
        other = attach_slot();
        EXPECT_EQ(other->tid.load(), tid_now());
        EXPECT_EQ(attach_slot(), other);
    }).join();
    EXPECT_NE(other, mine);
    EXPECT_FALSE(attach_slots_exhausted());
}

TEST(AttachSlots, BegunMovesFirst) {
    AttachSlot* slot = attach_slot();
    const std::uint64_t at = slot->begun.load();
    EXPECT_EQ(slot->done.load(), at);
    attach_begin(slot);
    EXPECT_EQ(slot->begun.load(), at + 1);
    EXPECT_EQ(slot->done.load(), at);
    attach_begin(slot);  // nested
    attach_done(slot);
    EXPECT_NE(slot->begun.load(), slot->done.load());
    attach_done(slot);
    EXPECT_EQ(slot->begun.load(), slot->done.load());
}

TEST(AttachSlots, EndedThreadsGiveTheirsBack) {
    attach_slot();
    std::thread([] { attach_slot(); }).join();
    const std::uint32_t in_use = slots_in_use();
    const std::uint32_t high = attach_slots_high();
    const std::uint64_t assigned = attach_slots_assigned();
    for (int i = 0; i < 50; ++i) {
        std::thread([] {
            AttachSlot* slot = attach_slot();
            attach_begin(slot);
            attach_done(slot);
        }).join();
    }
    EXPECT_EQ(slots_in_use(), in_use);
    EXPECT_EQ(attach_slots_high(), high);
    EXPECT_EQ(attach_slots_assigned(), assigned + 50) << "each one is counted";
}

// The next owner goes on counting from there: a reader that still has the old number sees it.
TEST(AttachSlots, CountersOnlyGrow) {
    std::uint64_t last = 0;
    AttachSlot* slot = nullptr;
    for (int i = 0; i < 5; ++i) {
        std::thread([&] {
            AttachSlot* now = attach_slot();
            if (slot != nullptr) {
                EXPECT_EQ(now, slot);
                EXPECT_GE(now->begun.load(), last);
            }
            slot = now;
            attach_begin(now);
            attach_done(now);
            last = now->begun.load();
        }).join();
    }
}

TEST(AttachSlots, ManyThreadsAtOnce) {
    constexpr int kThreads = 24;
    const auto rounds = static_cast<int>(scaled(20));
    for (int round = 0; round < rounds; ++round) {
        std::vector<std::thread> threads;
        std::vector<AttachSlot*> taken(kThreads);
        std::atomic<int> waiting{kThreads};
        for (int t = 0; t < kThreads; ++t) {
            threads.emplace_back([&, t] {
                AttachSlot* slot = attach_slot();
                taken[static_cast<std::size_t>(t)] = slot;
                for (int i = 0; i < 100; ++i) {
                    attach_begin(slot);
                    attach_done(slot);
                }
                --waiting;
                while (waiting.load() != 0) std::this_thread::yield();
                EXPECT_EQ(slot->tid.load(), tid_now());
            });
        }
        for (std::thread& thread : threads) thread.join();
        const std::set<AttachSlot*> distinct(taken.begin(), taken.end());
        EXPECT_EQ(distinct.size(), taken.size());
    }
}

// A reader brackets a change that takes two stores: with equal counters it never sees half of it.
TEST(AttachSlots, BracketsWhatChangesInBetween) {
    std::atomic<bool> stop{false};
    std::atomic<AttachSlot*> shown{nullptr};
    struct {
        std::atomic<std::uint64_t> a{0}, b{0};
    } pair;
    std::thread writer([&] {
        AttachSlot* slot = attach_slot();
        shown.store(slot);
        for (std::uint64_t i = 1; !stop.load(std::memory_order_relaxed); ++i) {
            attach_begin(slot);
            pair.a.store(i, std::memory_order_relaxed);
            pair.b.store(i, std::memory_order_relaxed);
            attach_done(slot);
            if (i % 16 == 0) std::this_thread::yield();
        }
    });
    while (shown.load() == nullptr) std::this_thread::yield();
    const AttachSlot* slot = shown.load();
    std::uint64_t proven = 0;
    for (std::uint64_t i = 0; i < scaled(300'000); ++i) {
        const std::uint64_t done = slot->done.load(std::memory_order_acquire);
        const std::uint64_t begun = slot->begun.load(std::memory_order_acquire);
        const std::uint64_t a = pair.a.load(std::memory_order_relaxed);
        const std::uint64_t b = pair.b.load(std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_acquire);
        if (done != begun || slot->begun.load(std::memory_order_relaxed) != begun) continue;
        ASSERT_EQ(a, b);
        ++proven;
    }
    stop.store(true);
    writer.join();
    EXPECT_GT(proven, 0u);
}

// A thread-exit handler of somebody else that attaches after ours has run.
TEST(AttachSlots, AttachInALaterThreadExitHandler) {
    attach_slot();  // our key exists: handlers run in the order of their keys on this C library
    static pthread_key_t key;
    static bool had_slot;
    ASSERT_EQ(pthread_key_create(&key,
                                 [](void*) {
                                     AttachSlot* slot = attach_slot();
                                     had_slot = slot->tid.load() == tid_now();
                                 }),
              0);
    const std::uint32_t in_use = slots_in_use();
    std::thread([] {
        attach_slot();
        pthread_setspecific(key, &key);
    }).join();
    EXPECT_TRUE(had_slot);
    EXPECT_EQ(slots_in_use(), in_use) << "the second slot came back too";
    pthread_key_delete(key);
}

#if !defined(__SANITIZE_THREAD__)  // fork with threads

TEST(AttachSlots, AfterForkTheCallerKeepsIts) {
    attach_slot();
    EXPECT_TRUE(forked([] {
        AttachSlot* slot = attach_slot();
        return slot->tid.load() == tid_now() && slots_in_use() == 1;
    }));
}

TEST(AttachSlots, AfterForkTheOthersAreFree) {
    ASSERT_NE(attach_slot(), nullptr);  // the one that the child keeps
    std::atomic<bool> stop{false};
    std::atomic<int> ready{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([&] {
            AttachSlot* slot = attach_slot();
            attach_begin(slot);  // in the middle of an attach
            ++ready;
            while (!stop.load()) std::this_thread::yield();
            attach_done(slot);
        });
    }
    while (ready.load() != 8) std::this_thread::yield();
    EXPECT_TRUE(forked([] {
        const std::uint32_t high = attach_slots_high();
        if (slots_in_use() != 1) return false;
        for (int i = 0; i < 30; ++i) {
            bool right = false;
            std::thread([&] {
                AttachSlot* slot = attach_slot();
                right = slot->tid.load() == tid_now();
            }).join();
            if (!right) return false;
        }
        return attach_slots_high() == high;
    }));
    stop.store(true);
    for (std::thread& thread : threads) thread.join();
}

// The child has no thread to end the attach that another thread was in. A reader in the child must
// not wait for it for ever.
TEST(AttachSlots, ASlotFreedInMidAttachIsAtRestForItsNextOwner) {
    EXPECT_TRUE(forked([] {
        std::atomic<bool> stop{false};
        std::atomic<bool> ready{false};
        std::thread other([&] {
            attach_begin(attach_slot());
            ready.store(true);
            while (!stop.load()) std::this_thread::yield();
        });
        while (!ready.load()) std::this_thread::yield();
        const bool at_rest = forked([] {
            bool rest = true;
            for (int i = 0; i < 3; ++i) {
                std::thread([&] {
                    AttachSlot* slot = attach_slot();
                    rest = rest && slot->begun.load() == slot->done.load();
                }).join();
            }
            return rest;
        });
        stop.store(true);
        other.join();
        return at_rest;
    }));
}

#endif

}  // namespace
}  // namespace otel_proflink::test
