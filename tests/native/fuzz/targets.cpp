// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.hpp"

#include <cstring>
#include <memory>

#include "code.hpp"
#include "fuzz/tape_memory.hpp"
#include "pprof.hpp"
#include "snapshot.hpp"
#include "strings.hpp"
#include "threads.hpp"
#include "wire.hpp"

namespace otel_proflink::test {
namespace {

LinkRecord* some_link() {
    static LinkRecord* record = [] {
        const std::uint8_t id[16] = {1, 2, 3, 4, 5, 6, 7, 8};
        return link_new(id, id, id, 1, 0, 0);
    }();
    return record;
}

Layout layout_of(std::uint8_t selector) {
    constexpr Layout layouts[] = {Layout::py311, Layout::py312, Layout::py313};
    return layouts[selector % 3];
}

// Lets the code table of each round read the round's tape.
class Relay final : public Memory {
  public:
    using Memory::read;
    bool read(const ReadRequest* requests, int count) noexcept override {
        if (dies != 0 && dies_after-- == 0) {
            dead_code_push(dies);
            dies = 0;
        }
        return now->read(requests, count);
    }
    Memory* now = nullptr;
    // A code object that the interpreter destroys while it is read.
    std::uintptr_t dies = 0;
    std::uint32_t dies_after = 0;
};

// Kept from round to round: making one maps some 60 MB.
struct Workspace {
    Relay memory;
    ProflinkAbi abi{};
    ContextKey key = make_key();
    AttachSlot slot{};
    CodeTable codes{memory, abi};
    Snapshotter snapshotter{memory, abi, key};
    Chain chain;
    Profile* profile = nullptr;
    std::uint32_t rounds = 0;

    void begin() {
        Profile* fresh = Profile::create(1);
        require(fresh != nullptr && codes.begin(fresh, &dead_codes()), "no memory");
        profile_free(profile);
        profile = fresh;
    }
};

}  // namespace

void fuzz_snapshot(const std::uint8_t* data, std::size_t size) {
    if (size < 2) return;
    static auto* work = new Workspace;
    work->abi = make_abi(layout_of(data[0]));
    if (work->rounds++ % 2048 == 0) work->begin();
    TapeMemory tape(data + 1, size - 1, some_link());
    work->memory.now = &tape;
    work->slot.tid.store(42);
    const ThreadKey thread{kTstate, 7, 42, &work->slot, 0};
    ThreadCache cache;
    for (int attempt = 0; attempt < 4; ++attempt) {
        work->codes.prepare();
        const SnapshotResult result =
            work->snapshotter.take(thread, &cache, &work->chain, &work->codes);
        require(work->chain.count <= kMaxFrames, "more frames than there is room for");
        if (result == SnapshotResult::ok) {
            require(work->chain.count != 0, "a chain without frames");
            require(cache.label.state != LabelState::unknown, "an unknown label is not a proof");
            work->codes.intern_stack();
        }
        work->codes.rollback();
        if (cache.label.state == LabelState::linked) {
            require(cache.label.serial == some_link()->serial.load(), "another link");
        }
        // The thread goes on.
        attach_begin(&work->slot);
        attach_done(&work->slot);
    }
}

void fuzz_code(const std::uint8_t* data, std::size_t size) {
    constexpr std::size_t kHead = 6;
    if (size < kHead) return;
    static auto* work = new Workspace;
    work->abi = make_abi(layout_of(data[0]));
    if (work->rounds++ % 2048 == 0) work->begin();
    CodeTable& codes = work->codes;
    Chain& chain = work->chain;
    // Frames that a walk may have found: of few code objects, at any instruction.
    const std::uint8_t* frames = data + kHead;
    const std::size_t given = std::min<std::size_t>(data[1] & 15, (size - kHead) / 3);
    chain.omitted = data[1] >= 240 && given != 0 ? 1 + data[2] : 0;
    chain.count = static_cast<std::uint32_t>(chain.omitted != 0 ? kMaxFrames : given);
    for (std::uint32_t i = 0; i < chain.count; ++i) {
        const std::uint8_t* from = frames + i % given * 3;
        Frame& frame = chain.frames[i] = {};
        frame.code = kRegion + (from[0] & 15u) * 32;
        std::uint16_t distance;
        std::memcpy(&distance, from + 1, sizeof(distance));
        frame.instruction = frame.code + work->abi.code.size + distance - 2;
    }
    TapeMemory tape(frames + given * 3, size - kHead - given * 3, some_link());
    work->memory.now = &tape;
    const std::uint64_t then = dead_codes().reported();
    if ((data[3] & 1) != 0) dead_code_push(kRegion + (data[3] >> 4) * 32u);
    const bool late = (data[3] & 2) != 0;
    if (!late) codes.prepare();
    const std::uintptr_t dying = chain.count != 0 ? chain.frames[0].code : 0;
    work->memory.dies = (data[4] & 1) != 0 ? dying : 0;
    work->memory.dies_after = data[4] >> 1;
    const bool dies = work->memory.dies != 0;
    const bool known = late ? codes.visit_late(chain, then) : codes.visit(chain);
    require(!(known && dies && work->memory.dies == 0), "a name of code that died");
    work->memory.dies = 0;
    if (known) {
        if (!late && (data[5] & 1) != 0) codes.frames_proven();
        Profile& profile = *work->profile;
        const std::uint32_t stack = codes.intern_stack();
        const std::uint32_t sample =
            profile.sample(stack, kNoEntry, profile.thread(data[5], 42), ThreadState::running);
        if (sample != kNoEntry) ++profile.samples[sample].count;
    }
    codes.rollback();
    if (work->rounds % 256 == 0) {
        Buffer out;
        require(encode_pprof(*work->profile, {}, &out) && out.size() != 0, "not encoded");
    }
}

void fuzz_threads(const std::uint8_t* data, std::size_t size) {
    if (size < 2) return;
    static auto* relay = new Relay;
    static auto* abi = new ProflinkAbi;
    static auto* threads = [] {
        auto* made = new ThreadList(*relay, *abi);
        require(made->reserve(), "no memory");
        return made;
    }();
    // The interpreter's own state is read as it is: it is there as long as the process.
    static std::uint64_t interpreter[2];
    *abi = make_abi(layout_of(data[0]));
    abi->interpreter = reinterpret_cast<std::uintptr_t>(interpreter);
    TapeMemory tape(data + 2, size - 2, some_link());
    tape.interpreter = abi->interpreter;
    relay->now = &tape;
    for (std::uint64_t tick = 0; tick < 4; ++tick) {
        interpreter[1] = data[1] >> 2 & tick;
        threads->refresh(tick + data[1], 1'000'000 * (tick + 1), 1'000'000, tick == 0);
        for (std::uint32_t i = 0; i < threads->size(); ++i) {
            const SampledThread& thread = (*threads)[i];
            require(thread.key.tid != 0, "a thread that is none");
            require(threads->find(thread.key.tstate, thread.key.id) == &thread, "one twice");
        }
        if (threads->size() != 0 && (data[1] & 1) != 0) threads->remove(0);
        if ((data[1] & 2) != 0) threads->distrust();
    }
    threads->clear();
}

void fuzz_label(const std::uint8_t* data, std::size_t size) {
    if (size < 1) return;
    const ProflinkAbi abi = make_abi(Layout::py313);
    TapeMemory tape(data + 1, size - 1, some_link());
    ContextKey key = make_key();
    key.task = {kOtherVariable, kOtherHash, kContextType};
    key.task_offset = 16;
    key.tasks = (data[0] & 1) != 0;
    LabelSource source;
    const Label label = read_label(tape, abi, key, kRegion, kRegion + 64, &source);
    if (label.state == LabelState::linked) {
        require(label.serial == some_link()->serial.load(), "another link");
        require(source.pair[0] == kVariable, "found under another key");
    }
    if (label.task != 0) {
        require(key.tasks && source.task.pair[0] == kOtherVariable, "a task of another key");
    }
    hamt_root_type(tape, abi, kRegion);
}

void fuzz_strings(const std::uint8_t* data, std::size_t size) {
    if (size < 5) return;
    const ProflinkAbi abi = make_abi(Layout::py312);
    std::int32_t unit;
    std::memcpy(&unit, data, sizeof(unit));
    TapeMemory tape(data + 4, size - 4, some_link());
    static auto* text = new Utf8;
    if (read_string(tape, abi, kRegion, text)) {
        require(text->size <= sizeof(text->data), "a string that is too long");
        // Well-formed UTF-8, which is what pprof and OTLP demand.
        for (std::uint32_t i = 0; i < text->size;) {
            const auto lead = static_cast<unsigned char>(text->data[i]);
            const std::uint32_t more = lead < 0x80   ? 0
                                       : lead < 0xc2 ? 9
                                       : lead < 0xe0 ? 1
                                       : lead < 0xf0 ? 2
                                       : lead < 0xf5 ? 3
                                                     : 9;
            require(more != 9 && i + more < text->size, "not UTF-8");
            for (std::uint32_t k = 1; k <= more; ++k) {
                require((text->data[i + k] & 0xc0) == 0x80, "not UTF-8");
            }
            i += more + 1;
        }
    }
    std::int32_t line = 0;
    if (read_line(tape, abi, kRegion, unit & 0xffff, unit >> 4, &line)) {
        require(line >= 0, "a negative line");
    }
}

}  // namespace otel_proflink::test
