// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>

#include "own_file.hpp"

namespace otel_proflink {
namespace {

// The descriptor of /proc/self/mem: one for all, because copies of a ProcessMemory come and go
// without a destructor. Its identity is written before it and read after it.
std::atomic<int> g_fd{-1};
std::atomic<int> g_pid{0};    // of the process whose memory it is
std::atomic<int> g_users{0};  // opened and not closed yet
std::atomic<dev_t> g_device{0};
std::atomic<ino_t> g_inode{0};
std::atomic_flag g_opening = ATOMIC_FLAG_INIT;

// Where nothing can be mapped: above the 57 bits of x86-64 and the 52 of aarch64. Where a hole was
// made just now, another thread may have made a mapping since.
constexpr std::uintptr_t kNowhere = std::uintptr_t{1} << 58;

bool is_ours(int fd) noexcept {
    FileIdentity now;
    return identify(fd, &now) && now.inode == g_inode.load(std::memory_order_relaxed) &&
           now.device == g_device.load(std::memory_order_relaxed);
}

// -1 with errno: there is none, or another thread is just opening it.
int shared_file() noexcept {
    const int before = g_fd.load(std::memory_order_acquire);
    if (is_ours(before)) return before;
    if (g_opening.test_and_set(std::memory_order_acquire)) return errno = EAGAIN, -1;
    int fd = g_fd.load(std::memory_order_acquire);
    if (fd == before) {
        OwnFile file;
        file.open("/proc/self/mem");
        const int error = errno;
        g_device.store(file.identity().device, std::memory_order_relaxed);
        g_inode.store(file.identity().inode, std::memory_order_relaxed);
        fd = file.release();
        g_fd.store(fd, std::memory_order_release);
        errno = error;
    }
    g_opening.clear(std::memory_order_release);
    return fd;
}

void close_shared_file() noexcept {
    const int fd = g_fd.exchange(-1);
    if (is_ours(fd)) ::close(fd);
}

bool is_refusal(int error) noexcept { return error == EPERM || error == EACCES || error == ENOSYS; }

const char* error_name(int error) noexcept {
    switch (error) {
        case 0:
            return "wrong content";
        case EPERM:
            return "EPERM";
        case EACCES:
            return "EACCES";
        case ENOSYS:
            return "ENOSYS";
        case ENOENT:
            return "ENOENT";
        case EMFILE:
            return "EMFILE";
        case ENFILE:
            return "ENFILE";
        case ESRCH:
            return "ESRCH";
        default:
            return "failed";
    }
}

}  // namespace

bool ProcessMemory::read(const ReadRequest* requests, int count) noexcept {
    Outcome outcome = by_file_ ? Outcome::refused : read_vm(requests, count);
    if (outcome == Outcome::refused) {
        outcome = read_file(requests, count);
        // Not on a bad address: that says nothing of what the file is good for.
        if (outcome == Outcome::read) by_file_ = true;
    }
    if (outcome == Outcome::read) return true;
    ++failures_;
    return false;
}

ProcessMemory::Outcome ProcessMemory::read_vm(const ReadRequest* requests, int count) noexcept {
    while (count > 0) {
        const int n = count < kBatch ? count : kBatch;
        ssize_t total = 0;
        for (int i = 0; i < n; ++i) {
            local_[i] = {requests[i].into, requests[i].size};
            remote_[i] = {reinterpret_cast<void*>(requests[i].address), requests[i].size};
            total += static_cast<ssize_t>(requests[i].size);
        }
        const ssize_t got = process_vm_readv(pid_, local_, static_cast<unsigned long>(n), remote_,
                                             static_cast<unsigned long>(n), 0);
        if (got != total) {
            error_ = got < 0 ? errno : EFAULT;
            return is_refusal(error_) ? Outcome::refused : Outcome::bad_address;
        }
        requests += n;
        count -= n;
    }
    return Outcome::read;
}

ProcessMemory::Outcome ProcessMemory::read_file(const ReadRequest* requests, int count) noexcept {
    const int fd = shared_file();
    if (fd < 0) return error_ = errno, Outcome::refused;
    for (int i = 0; i < count; ++i) {
        const auto size = static_cast<ssize_t>(requests[i].size);
        const ssize_t got =
            pread(fd, requests[i].into, requests[i].size, static_cast<off_t>(requests[i].address));
        if (got != size) return error_ = got < 0 ? errno : EFAULT, Outcome::bad_address;
    }
    return Outcome::read;
}

bool ProcessMemory::probe() noexcept {
    const std::uint64_t known = 0x70726f666c696e6bu;
    std::uint64_t seen = 0;
    const ReadRequest good{reinterpret_cast<std::uintptr_t>(&known), &seen, sizeof(seen)};
    const ReadRequest bad{kNowhere, &seen, sizeof(seen)};
    const auto outcome = [this](const ReadRequest& request) {
        return by_file_ ? read_file(&request, 1) : read_vm(&request, 1);
    };
    error_ = 0;
    return outcome(good) == Outcome::read && seen == known && outcome(bad) == Outcome::bad_address;
}

bool ProcessMemory::open(const char** reason) noexcept {
    close();
    pid_ = getpid();
    if (g_pid.exchange(pid_) != pid_) {
        // In a forked child the file is the parent's memory, and its users are the parent's.
        close_shared_file();
        g_users.store(0);
        g_opening.clear();
    }
    g_users.fetch_add(1);
    opened_ = true;
    failures_ = 0;
    if (probe()) return true;
    const char* first = error_name(error_);
    by_file_ = true;
    if (probe()) return true;
    static char text[128];
    std::snprintf(text, sizeof(text),
                  "memory cannot be read without faults (process_vm_readv: %s, /proc/self/mem: %s)",
                  first, error_name(error_));
    close();
    *reason = text;
    return false;
}

void ProcessMemory::close() noexcept {
    by_file_ = false;
    if (!opened_) return;
    opened_ = false;
    if (getpid() != pid_ || g_users.fetch_sub(1) == 1) close_shared_file();
}

}  // namespace otel_proflink
