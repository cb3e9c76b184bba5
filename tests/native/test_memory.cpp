// SPDX-License-Identifier: Apache-2.0
//
// Fault-free reads of our own memory, with and without process_vm_readv.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

#include "memory.hpp"

namespace otel_proflink::test {
namespace {

const std::size_t kPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// Two readable pages with `pattern`, followed by one that is not mapped.
class Pages {
  public:
    Pages() {
        void* map =
            mmap(nullptr, 3 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        bytes = static_cast<unsigned char*>(map);
        for (std::size_t i = 0; i < 2 * kPage; ++i) bytes[i] = static_cast<unsigned char>(i * 7);
        munmap(bytes + 2 * kPage, kPage);
    }
    ~Pages() { munmap(bytes, 2 * kPage); }
    std::uintptr_t at(std::size_t offset) const {
        return reinterpret_cast<std::uintptr_t>(bytes) + offset;
    }
    unsigned char* bytes;
};

// What every rung of the ladder must do. Returns the first thing that it does not.
const char* faults_of(ProcessMemory& memory) {
    Pages pages;
    unsigned char into[256] = {};
    if (!memory.read(pages.at(100), into, sizeof(into)) ||
        std::memcmp(into, pages.bytes + 100, sizeof(into)) != 0) {
        return "a good read";
    }
    if (!memory.read(pages.at(kPage - 10), into, 20) ||
        std::memcmp(into, pages.bytes + kPage - 10, 20) != 0) {
        return "across pages";
    }
    if (!memory.read(pages.at(2 * kPage - 8), into, 8)) return "up to the last byte";
    const std::uint64_t failures = memory.failures();
    if (memory.read(pages.at(2 * kPage - 7), into, 8)) return "one byte too many";
    if (memory.read(pages.at(2 * kPage), into, 1)) return "an unmapped page";
    if (memory.read(std::uintptr_t{0}, into, 8)) return "null";
    if (memory.read(std::uintptr_t{1}, into, 8)) return "an odd small address";
    if (memory.read(~std::uintptr_t{0} - 3, into, 8)) return "a wrap-around";
    if (memory.read(std::uintptr_t{0xffff800000000000}, into, 8)) return "a kernel address";
    if (memory.read(std::uintptr_t{0x00deadbeefdead00}, into, 8)) return "a non-canonical address";
    if (memory.failures() - failures != 7) return "the count of failures";

    void* closed = mmap(nullptr, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bool refused = !memory.read(reinterpret_cast<std::uintptr_t>(closed), into, 8);
    munmap(closed, kPage);
    // /proc/self/mem may look through protections; what matters is that nothing faults.
    if (std::strcmp(memory.name(), "process_vm_readv") == 0 && !refused) return "a closed page";

    constexpr int kCount = 200;  // more than one system call's worth
    std::vector<unsigned char> out(kCount * 3);
    std::vector<ReadRequest> requests;
    for (int i = 0; i < kCount; ++i) {
        requests.push_back(
            {pages.at(static_cast<std::size_t>(i) * 40), &out[static_cast<std::size_t>(i) * 3], 3});
    }
    if (!memory.read(requests.data(), kCount)) return "a large batch";
    for (std::size_t i = 0; i < kCount; ++i) {
        if (std::memcmp(&out[i * 3], pages.bytes + i * 40, 3) != 0) return "a batch's content";
    }
    requests[150].address = pages.at(2 * kPage);
    if (memory.read(requests.data(), kCount)) return "a bad address in a batch";
    requests[150].address = pages.at(2 * kPage - 1);
    if (memory.read(requests.data(), kCount)) return "a partly bad request in a batch";
    return nullptr;
}

TEST(Memory, FirstRung) {
    ProcessMemory memory;
    const char* reason = nullptr;
    ASSERT_TRUE(memory.open(&reason)) << reason;
    EXPECT_EQ(memory.failures(), 0u) << "its own probe does not count";
    EXPECT_STREQ(faults_of(memory), nullptr);
    memory.close();
}

TEST(Memory, OpensAgain) {
    ProcessMemory memory;
    const char* reason = nullptr;
    for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(memory.open(&reason));
        const std::uint64_t word = 0x1122334455667788u;
        std::uint64_t seen = 0;
        EXPECT_TRUE(memory.read(reinterpret_cast<std::uintptr_t>(&word), &seen, 8));
        EXPECT_EQ(seen, word);
        memory.close();
    }
}

// A probe of a hole that was mapped a moment ago found another thread's mapping there, and took the
// rung for one that reads what there is not.
TEST(Memory, OpensWhileOtherThreadsMapMemory) {
    std::atomic<bool> done{false};
    std::vector<std::thread> mappers;
    for (int i = 0; i < 3; ++i) {
        mappers.emplace_back([&done] {
            while (!done.load()) {
                void* maps[16];
                for (void*& map : maps) {
                    map = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                               -1, 0);
                }
                for (void* map : maps) munmap(map, kPage);
            }
        });
    }
    ProcessMemory memory;
    const char* reason = nullptr;
    ASSERT_TRUE(memory.open(&reason)) << reason;
    const char* first = memory.name();
    int others = 0;
    const int tries = 20'000;
    for (int i = 0; i < tries; ++i) {
        others += memory.open(&reason) && memory.name() == first ? 0 : 1;
    }
    done.store(true);
    for (std::thread& mapper : mappers) mapper.join();
    memory.close();
    EXPECT_EQ(others, 0);
}

TEST(Memory, AForkedChildReadsItsOwn) {
    ProcessMemory memory;
    const char* reason = nullptr;
    ASSERT_TRUE(memory.open(&reason));
    static std::uint64_t word = 1;
    const pid_t pid = fork();
    if (pid == 0) {
        word = 2;
        std::uint64_t seen = 0;
        const bool opened = memory.open(&reason);
        const bool read = memory.read(reinterpret_cast<std::uintptr_t>(&word), &seen, 8);
        _exit(opened && read && seen == 2 ? 0 : 1);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    EXPECT_EQ(status, 0);
    memory.close();
}

// --- As in a container whose seccomp profile refuses the call

bool refuse(long call, long also = -1) {
    const auto deny = SECCOMP_RET_ERRNO | (EPERM & SECCOMP_RET_DATA);
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<__u32>(call), 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<__u32>(also), 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, static_cast<__u32>(deny)),
    };
    const sock_fprog program{static_cast<unsigned short>(std::size(filter)), filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

constexpr int kNoSeccomp = 77;

// The exit status of `child` in a forked process.
template <typename Child>
int forked(Child child) {
    const pid_t pid = fork();
    if (pid == 0) _exit(child());
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

TEST(Memory, SecondRung) {
    const int status = forked([] {
        if (!refuse(SYS_process_vm_readv)) return kNoSeccomp;
        ProcessMemory memory;
        const char* reason = nullptr;
        if (!memory.open(&reason)) return 2;
        if (std::strcmp(memory.name(), "/proc/self/mem") != 0) return 3;
        if (memory.failures() != 0) return 4;
        const char* fault = faults_of(memory);
        if (fault != nullptr) std::fprintf(stderr, "at fault: %s\n", fault);
        memory.close();
        return fault == nullptr ? 0 : 5;
    });
    if (status == kNoSeccomp) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0);
}

// A copy, as a thread's handler has one, and the filter comes after it was made.
TEST(Memory, RefusedLater) {
    const int status = forked([] {
        ProcessMemory memory;
        const char* reason = nullptr;
        if (!memory.open(&reason)) return 2;
        ProcessMemory copy = memory;
        if (!refuse(SYS_process_vm_readv)) return kNoSeccomp;
        for (ProcessMemory* each : {&memory, &copy}) {
            std::uint64_t seen = 0;
            const std::uint64_t word = 0x1122334455667788u;
            if (each->read(std::uintptr_t{16}, &seen, 8)) return 3;
            if (!each->read(reinterpret_cast<std::uintptr_t>(&word), &seen, 8)) return 4;
            if (seen != word || std::strcmp(each->name(), "/proc/self/mem") != 0) return 5;
            if (each->failures() != 1) return 6;
        }
        memory.close();
        return 0;
    });
    if (status == kNoSeccomp) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0);
}

// A descriptor of ours whose number is another file's by now: neither read nor closed.
TEST(Memory, TheFileWasClosedByOthers) {
    const int status = forked([] {
        if (!refuse(SYS_process_vm_readv)) return kNoSeccomp;
        ProcessMemory memory;
        const char* reason = nullptr;
        if (!memory.open(&reason)) return 2;
        const int lowest = dup(0);
        const int ours = lowest - 1;
        char path[64];
        char target[64] = {};
        std::snprintf(path, sizeof(path), "/proc/self/fd/%d", ours);
        if (readlink(path, target, sizeof(target) - 1) < 0) return 3;
        if (std::strstr(target, "/mem") == nullptr) return 4;
        const int theirs = memfd_create("theirs", 0);
        if (theirs < 0 || dup2(theirs, ours) != ours) return 5;
        std::uint64_t seen = 0;
        const std::uint64_t word = 0x1122334455667788u;
        if (!memory.read(reinterpret_cast<std::uintptr_t>(&word), &seen, 8)) return 6;
        if (seen != word) return 7;
        memory.close();
        return fcntl(ours, F_GETFD) >= 0 && memory.failures() == 0 ? 0 : 8;
    });
    if (status == kNoSeccomp) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0);
}

TEST(Memory, NoRung) {
    const int status = forked([] {
        if (!refuse(SYS_process_vm_readv, SYS_openat)) return kNoSeccomp;
        ProcessMemory memory;
        const char* reason = nullptr;
        if (memory.open(&reason)) return 2;
        return std::strcmp(reason,
                           "memory cannot be read without faults (process_vm_readv: EPERM, "
                           "/proc/self/mem: EPERM)") == 0
                   ? 0
                   : 3;
    });
    if (status == kNoSeccomp) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace otel_proflink::test
