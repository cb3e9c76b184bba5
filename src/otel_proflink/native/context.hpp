// SPDX-License-Identifier: Apache-2.0
//
// From a `contextvars.Context` to the link in it, by reads alone.
#pragma once

#include "abi.h"
#include "context_key.hpp"
#include "link.hpp"
#include "memory.hpp"

namespace otel_proflink {

enum class LabelState : std::uint8_t {
    none,     // proven: no span is attached
    linked,   // proven: this link
    unknown,  // not proven either way
};

struct Label {
    LabelState state = LabelState::unknown;
    std::uint64_t serial = 0;  // of the link record
    LinkData link{};
    std::uint64_t task = 0;  // number of the task that handed this work over, 0 = none
};

// A pair of the HAMT that was read.
struct PairSource {
    std::uintptr_t address = 0;  // 0: there was none
    std::uintptr_t pair[2] = {};

    bool same(const PairSource& other) const noexcept {
        return pair[0] == other.pair[0] && pair[1] == other.pair[1];
    }
};

// What a label was read from.
struct LabelSource : PairSource {
    PairSource task;

    bool same(const LabelSource& other) const noexcept {
        return PairSource::same(other) && task.same(other.task);
    }
};

// Reads the label of `context` (the address of a PyContext, 0 = the thread has none yet), whose
// variables are the HAMT at `variables`. Alone it proves nothing: the caller brackets it.
Label read_label(Memory& memory, const ProflinkAbi& abi, const ContextKey& key,
                 std::uintptr_t context, std::uintptr_t variables, LabelSource* source) noexcept;

inline Label read_label(Memory& memory, const ProflinkAbi& abi, const ContextKey& key,
                        std::uintptr_t context, std::uintptr_t variables) noexcept {
    LabelSource source;
    return read_label(memory, abi, key, context, variables, &source);
}

// For the self-test: the type of the root node of a context's HAMT; 0 on failure.
std::uintptr_t hamt_root_type(Memory& memory, const ProflinkAbi& abi,
                              std::uintptr_t context) noexcept;

}  // namespace otel_proflink
