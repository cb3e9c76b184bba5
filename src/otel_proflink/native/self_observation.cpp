// SPDX-License-Identifier: Apache-2.0
#include "self_observation.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <initializer_list>
#include <new>

#include "code.hpp"

namespace otel_proflink {
namespace {

// Too large for a caller's stack.
struct Workspace {
    explicit Workspace(const ProflinkAbi& abi) noexcept
        : codes(memory, abi), snapshotter(memory, abi, context_key()) {}
    ProcessMemory memory;
    CodeTable codes;
    Snapshotter snapshotter;
    Chain chain;
    ThreadCache cache;
};

const AttachSlot* slot_of(std::int32_t tid) noexcept {
    const AttachSlot* slots = attach_slots();
    for (std::uint32_t i = 0; i < attach_slots_high(); ++i) {
        if (slots[i].tid.load(std::memory_order_acquire) == tid) return &slots[i];
    }
    return nullptr;
}

}  // namespace

const char* SelfObservation::take(std::uintptr_t tstate, std::uint64_t id) noexcept {
    profile_free(profile_);
    profile_ = Profile::create(1);
    auto* place = static_cast<Workspace*>(std::malloc(sizeof(Workspace)));
    if (profile_ == nullptr || place == nullptr) {
        std::free(place);
        return "out of memory";
    }
    auto* work = new (place) Workspace(abi_);
    const auto tid = static_cast<std::int32_t>(syscall(SYS_gettid));
    const ThreadKey key{tstate, id, tid, slot_of(tid), attach_slots_assigned()};
    const char* reason = nullptr;
    if (work->memory.open(&reason) && !work->codes.begin(profile_, nullptr)) {
        reason = "out of memory";
    }
    if (reason == nullptr) {
        switch (work->snapshotter.take(key, &work->cache, &work->chain, &work->codes)) {
            case SnapshotResult::ok:
                stack_ = work->codes.intern_stack();
                if (work->cache.label.state == LabelState::linked) {
                    serial_ = work->cache.label.serial;
                } else if (work->cache.label.state == LabelState::none) {
                    serial_ = 0;
                }
                break;
            case SnapshotResult::no_frames:
                reason = "no frame was found where there is one";
                break;
            case SnapshotResult::gone:
                reason = "the thread state's fields are not where they should be";
                break;
            case SnapshotResult::torn:
                reason = "the frames or the context of a thread at rest could not be read";
                break;
        }
    }
    work->memory.close();
    work->~Workspace();
    std::free(place);
    return reason;
}

std::uint32_t SelfObservation::depth() const noexcept { return profile_->stacks[stack_].count; }

const Function& SelfObservation::function(std::uint32_t frame) const noexcept {
    const std::uint32_t location = profile_->frames[profile_->stacks[stack_].first + frame];
    return profile_->functions[profile_->locations[location].function];
}

const char* SelfObservation::text(std::uint32_t string, std::uint32_t* size) const noexcept {
    *size = profile_->strings[string].size;
    return &profile_->text[profile_->strings[string].offset];
}

const char* SelfObservation::name(std::uint32_t frame, std::uint32_t* size) const noexcept {
    return text(function(frame).name, size);
}

const char* SelfObservation::file(std::uint32_t frame, std::uint32_t* size) const noexcept {
    return text(function(frame).file, size);
}

std::int32_t SelfObservation::line(std::uint32_t frame) const noexcept {
    return profile_->locations[profile_->frames[profile_->stacks[stack_].first + frame]].line;
}

bool layout_plausible(const ProflinkAbi& abi) noexcept {
    constexpr std::uint32_t kWord = 8;
    const auto inside = [](std::uint32_t size, std::initializer_list<std::uint32_t> fields) {
        for (const std::uint32_t field : fields) {
            if (field > size - kWord) return false;
        }
        return size >= kWord;
    };
    // What the readers have room for: FrameReader, Snapshotter, CodeTable, LabelSource.
    if (abi.frame.size > 128 || abi.thread.size > 512 || abi.code.size > 256) return false;
    const ProflinkAbiThread& t = abi.thread;
    const ProflinkAbiFrame& f = abi.frame;
    const ProflinkAbiCode& c = abi.code;
    return inside(t.size, {t.prev, t.next, t.interp, t.frame, t.native_thread_id, t.id, t.context,
                           t.context_ver, t.datastack_chunk, t.datastack_top}) &&
           inside(f.size, {f.code, f.previous, f.instruction}) && f.owner < f.size &&
           f.copy <= f.size - 4 &&
           inside(c.size, {c.units, c.filename, c.qualname, c.linetable, c.copies}) &&
           c.first_line <= c.size - 4 && c.first_traceable <= c.size - 4 &&
           abi.context.bitmap_pairs <= 64;
}

bool thread_list_is(const ProflinkAbi& abi, const std::uintptr_t* tstates,
                    std::size_t count) noexcept {
    std::uint64_t at = observed_word(abi.interpreter + abi.interpreter_state.threads_head);
    for (std::size_t i = 0; i < count; ++i) {
        if (at != tstates[i]) return false;
        if (observed_word(at + abi.thread.prev) != (i == 0 ? 0 : tstates[i - 1])) return false;
        at = observed_word(at + abi.thread.next);
    }
    return at == 0;
}

const char* memory_refusal() noexcept {
    ProcessMemory memory;
    const char* reason = nullptr;
    if (memory.open(&reason)) memory.close();
    return reason;
}

bool thread_list_has(const ProflinkAbi& abi, std::uintptr_t tstate) noexcept {
    constexpr int kMost = 65536;
    std::uint64_t previous = 0;
    std::uint64_t at = observed_word(abi.interpreter + abi.interpreter_state.threads_head);
    for (int i = 0; i < kMost && at != 0; ++i) {
        if (observed_word(at + abi.thread.prev) != previous) return false;
        if (at == tstate) return true;
        previous = at;
        at = observed_word(at + abi.thread.next);
    }
    return false;
}

std::uint64_t observed_word(std::uintptr_t address) noexcept {
    ProcessMemory memory;
    const char* reason = nullptr;
    std::uint64_t word = 0;
    if (!memory.open(&reason) || !memory.read(address, &word, sizeof(word))) word = ~0ull;
    memory.close();
    return word;
}

std::uintptr_t current_hamt_root_type(const ProflinkAbi& abi, std::uintptr_t context) noexcept {
    ProcessMemory memory;
    const char* reason = nullptr;
    if (!memory.open(&reason)) return 0;
    const std::uintptr_t type = hamt_root_type(memory, abi, context);
    memory.close();
    return type;
}

}  // namespace otel_proflink
