// SPDX-License-Identifier: Apache-2.0
//
// Fault-free reads of our own process's memory: any address may be asked for.
#pragma once

#include <sys/uio.h>

#include <cstdint>

#include "export.hpp"

namespace otel_proflink {

struct ReadRequest {
    std::uintptr_t address;
    void* into;
    std::uint32_t size;
};

// A word of the main interpreter's state: static storage of the runtime (3.11 on), there as long as
// the process is. No system call, unlike the rest.
inline std::uint64_t runtime_word(std::uintptr_t address) noexcept {
    return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(address), __ATOMIC_RELAXED);
}

// The interface exists so that tests can hand the walker a memory that changes between reads.
class Memory {
  public:
    // Reads all of the requests, in their order, or reports false. Never faults, never blocks on
    // anything that the application can hold.
    virtual bool read(const ReadRequest* requests, int count) noexcept = 0;

    bool read(std::uintptr_t address, void* into, std::uint32_t size) noexcept {
        const ReadRequest request{address, into, size};
        return read(&request, 1);
    }

  protected:
    ~Memory() = default;
};

// The ladder: process_vm_readv (one system call for a batch), else preads of /proc/self/mem. A rung
// that is refused later, as by a seccomp filter that the application installs after we began, is
// left then. Copies may be used on other threads, one thread each.
class ProcessMemory final : public Memory {
  public:
    using Memory::read;
    bool read(const ReadRequest* requests, int count) noexcept override;

    // Picks the first rung that really reads, and really refuses a bad address. False with
    // `reason`, good until the next call, when none does. Call again in a forked child.
    bool open(const char** reason) noexcept;
    // The last one gives the descriptor back that all share, if there is one.
    void close() noexcept;

    std::uint64_t failures() const noexcept { return failures_; }
    const char* name() const noexcept { return by_file_ ? "/proc/self/mem" : "process_vm_readv"; }

  private:
    enum class Outcome : std::uint8_t { read, bad_address, refused };
    Outcome read_vm(const ReadRequest* requests, int count) noexcept;
    Outcome read_file(const ReadRequest* requests, int count) noexcept;
    bool probe() noexcept;

    // One system call's worth. Not on the stack, which may be a signal handler's small one.
    static constexpr int kBatch = 64;

    int pid_ = 0;
    bool opened_ = false;
    bool by_file_ = false;
    int error_ = 0;  // why the last read failed
    std::uint64_t failures_ = 0;
    iovec local_[kBatch];
    iovec remote_[kBatch];
};

}  // namespace otel_proflink
