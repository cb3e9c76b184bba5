// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "code.hpp"
#include "snapshot.hpp"
#include "strings.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {
namespace {

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "fuzz target: %s\n", what);
    std::abort();
}

constexpr std::uintptr_t kTstate = 0x7f0000001000;
constexpr std::uintptr_t kRegion = 0x7f0000010000;
// No buffer of any reader is larger: it would have asked for more than it has room for.
constexpr std::uint32_t kMaxRead = 16384;
// Far above what the longest honest walk needs; a reader that goes on has lost its way.
constexpr std::uint64_t kMaxCalls = 1u << 18;

// Answers from a tape: a byte says what kind of word follows, so that few bytes lead far. When the
// tape ends all reads fail.
class TapeMemory final : public Memory {
  public:
    TapeMemory(const std::uint8_t* data, std::size_t size, const LinkRecord* record)
        : at_(data), end_(data + size), record_(record) {}
    using Memory::read;

    bool read(const ReadRequest* requests, int count) noexcept override {
        require(++calls_ < kMaxCalls, "reads without end");
        for (int i = 0; i < count; ++i) {
            const ReadRequest& request = requests[i];
            require(request.size <= kMaxRead, "a read larger than any buffer");
            auto* into = static_cast<unsigned char*>(request.into);
            std::memset(into, 0, request.size);  // all of it is there to be written to
            for (std::uint32_t at = 0; at < request.size; at += 8) {
                if (at_ == end_) return false;
                const std::uint64_t word = next(request.address + at);
                std::memcpy(into + at, &word, std::min(8u, request.size - at));
                // Large windows are mostly one thing.
                if (at >= 512) break;
            }
        }
        return true;
    }

  private:
    std::uint64_t raw(std::size_t bytes) {
        std::uint64_t value = 0;
        const std::size_t left = std::min<std::size_t>(bytes, static_cast<std::size_t>(end_ - at_));
        std::memcpy(&value, at_, left);
        at_ += left;
        return value;
    }

    std::uint64_t next(std::uintptr_t address) {
        // A thread that is the right one; else no tape would get past the first check.
        if (address == kTstate + tstate_at::interp) return kInterpreter;
        if (address == kTstate + tstate_at::native_thread_id) return 42;
        if (address == kTstate + tstate_at::id) return 7;
        const std::uint8_t kind = *at_++;
        switch (kind >> 4) {
            case 0:
                return 0;
            case 1:
                return kind & 15;
            case 2:
                return raw(1);
            case 3:
            case 4:
            case 5:
                return kRegion + 8 * raw(1);
            case 6: {
                constexpr std::uint64_t known[] = {kCodeType, kBitmapType,  kArrayType, kValueType,
                                                   kVariable, kContextType, kTstate,    kRegion,
                                                   kMaxRead,  kMaxRead - 8};
                return known[(kind & 15) % std::size(known)];
            }
            case 7:
                return reinterpret_cast<std::uint64_t>(record_);
            case 8:
                return record_->serial.load(std::memory_order_relaxed);
            case 9:
                return last_ = kRegion + (kind & 15) * 32;
            case 10:
                return last_;
            case 11:
                return last_ + 8 * static_cast<std::uint64_t>(kind & 15) + code_at::size;
            case 12:
                return ~std::uint64_t{0} - raw(1);
            case 13:
                return std::uint64_t{1} << (raw(1) & 63);
            case 14:
                return raw(4);
            default:
                return raw(8);
        }
    }

    const std::uint8_t* at_;
    const std::uint8_t* end_;
    const LinkRecord* record_;
    std::uint64_t last_ = kRegion;
    std::uint64_t calls_ = 0;
};

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
        return now->read(requests, count);
    }
    Memory* now = nullptr;
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

void fuzz_label(const std::uint8_t* data, std::size_t size) {
    const ProflinkAbi abi = make_abi(Layout::py313);
    TapeMemory tape(data, size, some_link());
    LabelSource source;
    const Label label = read_label(tape, abi, make_key(), kRegion, kRegion + 64, &source);
    if (label.state == LabelState::linked) {
        require(label.serial == some_link()->serial.load(), "another link");
        require(source.pair[0] == kVariable, "found under another key");
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
