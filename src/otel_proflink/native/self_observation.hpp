// SPDX-License-Identifier: Apache-2.0
//
// The sampler's own eyes turned on the calling thread, so that the start-up self-test can compare
// what they see with what the interpreter says.
#pragma once

#include "abi.h"
#include "profile.hpp"

namespace otel_proflink {

class PROFLINK_EXPORT SelfObservation {
  public:
    explicit SelfObservation(const ProflinkAbi& abi) noexcept : abi_(abi) {}
    SelfObservation(const SelfObservation&) = delete;
    SelfObservation& operator=(const SelfObservation&) = delete;
    ~SelfObservation() { profile_free(profile_); }

    // Observes the calling thread, which holds the GIL. nullptr, or the reason why it failed.
    const char* take(std::uintptr_t tstate, std::uint64_t id) noexcept;

    std::uint32_t depth() const noexcept;
    const char* name(std::uint32_t frame, std::uint32_t* size) const noexcept;
    const char* file(std::uint32_t frame, std::uint32_t* size) const noexcept;
    std::int32_t line(std::uint32_t frame) const noexcept;
    // Serial of the link that the thread's context shows; 0 = none, all ones = unknown.
    std::uint64_t link_serial() const noexcept { return serial_; }

  private:
    const Function& function(std::uint32_t frame) const noexcept;
    const char* text(std::uint32_t string, std::uint32_t* size) const noexcept;

    const ProflinkAbi& abi_;
    Profile* profile_ = nullptr;
    std::uint32_t stack_ = 0;
    std::uint64_t serial_ = ~0ull;
};

// False: no interpreter is laid out like this; reading by it would not even be defined.
PROFLINK_EXPORT bool layout_plausible(const ProflinkAbi& abi) noexcept;

// Whether the list of thread states, as the sampler walks it, is `tstates`, in this order. The
// caller holds the GIL.
PROFLINK_EXPORT bool thread_list_is(const ProflinkAbi& abi, const std::uintptr_t* tstates,
                                    std::size_t count) noexcept;

// Why no memory can be read at all; nullptr if it can.
PROFLINK_EXPORT const char* memory_refusal() noexcept;

// Whether the calling thread's state is found in the list, as the sampler walks it. For where no
// lock of ours keeps other threads from ending; then it may fail by chance.
PROFLINK_EXPORT bool thread_list_has(const ProflinkAbi& abi, std::uintptr_t tstate) noexcept;

// A word as the sampler reads it; all ones when it cannot be read.
PROFLINK_EXPORT std::uint64_t observed_word(std::uintptr_t address) noexcept;

// The type of the root node of the calling thread's context variables; 0 on failure.
PROFLINK_EXPORT std::uintptr_t current_hamt_root_type(const ProflinkAbi& abi,
                                                      std::uintptr_t context) noexcept;

}  // namespace otel_proflink
