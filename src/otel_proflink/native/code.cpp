// SPDX-License-Identifier: Apache-2.0
#include "code.hpp"

#include <cstdio>
#include <cstring>
#include <new>

namespace otel_proflink {
namespace {

template <typename T>
T load(const unsigned char* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

DeadCodes g_dead;

}  // namespace

DeadCodes& dead_codes() noexcept { return g_dead; }

void dead_code_push(std::uintptr_t code) noexcept { g_dead.push(code); }

std::uint64_t DeadCodes::pack(std::uintptr_t code, std::uint64_t at) noexcept {
    const std::uint64_t lap = (at / kCapacity + 1) & ((1u << kLapBits) - 1);
    return (static_cast<std::uint64_t>(code) / alignof(void*)) << kLapBits | lap;
}

void DeadCodes::push(std::uintptr_t code) noexcept {
    const std::uint64_t at = head_.fetch_add(1, std::memory_order_acq_rel);
    ring_[at % kCapacity].store(pack(code, at), std::memory_order_release);
}

std::uint32_t DeadCodes::drain(std::uintptr_t* out, std::uint32_t capacity) noexcept {
    const std::uint64_t head = head_.load(std::memory_order_acquire);
    const std::uint64_t count = head - tail_;
    const std::uint64_t tail = tail_;
    tail_ = head;
    if (count > kCapacity || count > capacity) return kNoEntry;
    for (std::uint64_t at = tail; at != head; ++at) {
        // A place is taken before it is written: waiting for that could be long, so distrust all.
        const std::uint64_t packed = ring_[at % kCapacity].load(std::memory_order_acquire);
        if (((packed ^ pack(0, at)) & ((1u << kLapBits) - 1)) != 0) return kNoEntry;
        *out++ = static_cast<std::uintptr_t>(packed >> kLapBits) * alignof(void*);
    }
    return static_cast<std::uint32_t>(count);
}

bool DeadCodes::since(std::uint64_t then, const Chain& chain) const noexcept {
    const std::uint64_t head = reported();
    if (head - then > kCapacity) return true;
    for (std::uint64_t at = then; at != head; ++at) {
        const std::uint64_t packed = ring_[at % kCapacity].load(std::memory_order_acquire);
        if (((packed ^ pack(0, at)) & ((1u << kLapBits) - 1)) != 0) return true;
        const std::uintptr_t code =
            static_cast<std::uintptr_t>(packed >> kLapBits) * alignof(void*);
        for (std::uint32_t i = 0; i < chain.count; ++i) {
            if (chain.frames[i].code == code) return true;
        }
    }
    return false;
}

bool CodeTable::begin(Profile* profile, DeadCodes* deaths) noexcept {
    profile_ = profile;
    deaths_ = deaths;
    pending_ = stack_size_ = 0;
    return reserve();
}

bool CodeTable::reserve() noexcept {
    // Fresh pages are zero, and an empty table is all zeroes: remapping is the reset.
    entries_.~Table();
    new (&entries_) Table<Entry>();
    places_.~Table();
    new (&places_) Table<Place>();
    entry_index_.~Index();
    new (&entry_index_) Index();
    place_index_.~Index();
    new (&place_index_) Index();
    return entries_.reserve(kMaxCodes) && places_.reserve(kMaxPlaces) &&
           entry_index_.reserve(kMaxCodes) && place_index_.reserve(kMaxPlaces);
}

void CodeTable::forget(std::uintptr_t code) noexcept {
    std::uint32_t slot;
    const std::uint32_t entry = entry_index_.find(
        mix(code), [&](std::uint32_t i) { return entries_[i].code == code; }, &slot);
    if (entry != kNoEntry) entries_[entry].live = false;
}

// True if none of the chain's code objects died.
bool CodeTable::drain(const Chain* chain) noexcept {
    if (deaths_ == nullptr) return true;
    const std::uint32_t count = deaths_->drain(drained_, DeadCodes::kCapacity);
    if (count == kNoEntry) {
        for (std::uint32_t i = 0; i < entries_.size(); ++i) entries_[i].live = false;
        return chain == nullptr;
    }
    bool intact = true;
    for (std::uint32_t i = 0; i < count; ++i) {
        forget(drained_[i]);
        for (std::uint32_t k = 0; chain != nullptr && k < chain->count; ++k) {
            if (chain->frames[k].code == drained_[i]) intact = false;
        }
    }
    return intact;
}

bool CodeTable::read_header(std::uintptr_t code, Header* header) noexcept {
    unsigned char raw[kMaxHeader];
    const ProflinkAbiCode& at = abi_.code;
    if (at.size > sizeof(raw) || !memory_.read(code, raw, at.size)) return false;
    header->filename = load<std::uintptr_t>(raw + at.filename);
    header->qualname = load<std::uintptr_t>(raw + at.qualname);
    header->linetable = load<std::uintptr_t>(raw + at.linetable);
    header->units = load<std::uint64_t>(raw + at.units);
    header->first_line = load<std::int32_t>(raw + at.first_line);
    header->first_traceable = load<std::int32_t>(raw + at.first_traceable);
    return load<std::uintptr_t>(raw + abi_.object.object_type) == abi_.code_type &&
           header->units != 0 && header->units < (1u << 28);
}

std::uint32_t CodeTable::lookup(std::uintptr_t code) noexcept {
    std::uint32_t slot;
    const std::uint32_t entry = entry_index_.find(
        mix(code), [&](std::uint32_t i) { return entries_[i].code == code; }, &slot);
    return entry != kNoEntry && entries_[entry].live ? entry : learn(code);
}

std::uint32_t CodeTable::learn(std::uintptr_t code) noexcept {
    Header header;
    if (!read_header(code, &header) || !read_string(memory_, abi_, header.qualname, &name_) ||
        !read_string(memory_, abi_, header.filename, &file_)) {
        return kNoEntry;
    }
    std::uint32_t slot;
    std::uint32_t entry = entry_index_.find(
        mix(code), [&](std::uint32_t i) { return entries_[i].code == code; }, &slot);
    if (entry == kNoEntry) {
        entry = entries_.add(Entry{});
        if (entry == kNoEntry) {
            ++profile_->overflows;
            return kNoEntry;
        }
        entry_index_.set(slot, entry);
    }
    Entry& made = entries_[entry];
    made.code = code;
    made.linetable = header.linetable;
    made.units = static_cast<std::uint32_t>(header.units);
    made.first_line = header.first_line;
    // Nothing in it is traceable: the interpreter never shows its frames, so neither do we.
    made.shim = header.first_traceable >= static_cast<std::int32_t>(header.units);
    made.function = profile_->function(profile_->string(name_.data, name_.size),
                                       profile_->string(file_.data, file_.size), header.first_line);
    ++made.epoch;
    made.live = true;
    if (pending_ < kMaxFrames) new_entries_[pending_++] = entry;
    return entry;
}

void CodeTable::rollback() noexcept {
    for (std::uint32_t i = 0; i < pending_; ++i) entries_[new_entries_[i]].live = false;
    pending_ = 0;
}

// Where the copy of the instructions begins that the frame runs; 0: it runs none. Not remembered:
// the interpreter may free a copy while its code object lives on, and the frame holds it only now.
std::uintptr_t CodeTable::copy_of(const Frame& frame) noexcept {
    std::uintptr_t copies = 0;
    std::int64_t count = 0;
    std::uintptr_t begin = 0;
    if (abi_.code.copies == 0 || frame.copy <= 0 ||
        !memory_.read(frame.code + abi_.code.copies, &copies, sizeof(copies)) || copies == 0 ||
        !memory_.read(copies, &count, sizeof(count)) || frame.copy >= count ||
        !memory_.read(
            copies + sizeof(count) + sizeof(begin) * static_cast<std::uint32_t>(frame.copy), &begin,
            sizeof(begin))) {
        return 0;
    }
    return begin;
}

// The index of the frame's instruction among those of its code object.
bool CodeTable::find_unit(const Frame& frame, const Entry& code, std::int32_t* unit) noexcept {
    const auto among = [&](std::uintptr_t begin) {
        const auto distance = static_cast<std::int64_t>(frame.instruction - begin);
        *unit = static_cast<std::int32_t>(distance / 2);
        return distance % 2 == 0 && distance / 2 >= abi_.code.first_instruction &&
               distance / 2 < static_cast<std::int64_t>(code.units);
    };
    if (among(frame.code + abi_.code.size)) return true;
    const std::uintptr_t copy = copy_of(frame);
    return copy != 0 && among(copy);
}

bool CodeTable::locate(const Frame& frame, std::uint32_t* location) noexcept {
    const std::uint32_t entry = lookup(frame.code);
    if (entry == kNoEntry) {
        if (!entries_.full()) return false;
        *location = 0;
        return true;
    }
    const Entry& code = entries_[entry];
    if (code.shim) {
        *location = kNoEntry;
        return true;
    }
    std::int32_t key = 0;
    if (!find_unit(frame, code, &key)) return false;
    std::uint32_t slot;
    const std::uint32_t epoch = code.epoch;
    const std::uint32_t place = place_index_.find(
        mix(mix(static_cast<std::uint64_t>(entry) << 32 | epoch) ^ static_cast<std::uint32_t>(key)),
        [&](std::uint32_t i) {
            const Place& p = places_[i];
            return p.entry == entry && p.epoch == epoch && p.unit == key;
        },
        &slot);
    if (place != kNoEntry) {
        *location = places_[place].location;
        return true;
    }
    std::int32_t line = 0;
    if (!read_line(memory_, abi_, code.linetable, code.first_line, key, &line)) return false;
    *location = profile_->location(code.function, line);
    const std::uint32_t made = places_.add({entry, epoch, key, *location});
    if (made != kNoEntry) place_index_.set(slot, made);
    return true;
}

void CodeTable::mark_omitted(std::uint32_t count) noexcept {
    char text[64];
    std::snprintf(text, sizeof(text), "[%u frames omitted]", count);
    const std::uint32_t name =
        profile_->string(text, static_cast<std::uint32_t>(std::strlen(text)));
    stack_[stack_size_++] = profile_->location(profile_->function(name, 0, 0), 0);
}

bool CodeTable::visit(const Chain& chain) noexcept {
    stack_size_ = 0;
    const bool cut = chain.count > limit_;
    const std::uint32_t leaf_end = cut ? (limit_ + 1) / 2 : kMaxFrames / 2;
    const std::uint32_t root_begin = cut ? chain.count - limit_ / 2 : leaf_end;
    for (std::uint32_t i = 0; i < chain.count; ++i) {
        if (i == leaf_end && (cut || chain.omitted != 0)) {
            mark_omitted(chain.omitted + root_begin - leaf_end);
            i = root_begin;
            if (i == chain.count) break;  // one frame is kept, the leaf
        }
        if (!locate(chain.frames[i], &stack_[stack_size_])) return false;
        if (stack_[stack_size_] != kNoEntry) ++stack_size_;
    }
    return drain(&chain);
}

// What is read now is what the frames ran if none of it has died in the meantime.
bool CodeTable::visit_late(const Chain& chain, std::uint64_t then) noexcept {
    prepare();
    if (deaths_ != nullptr && deaths_->since(then, chain)) return false;
    // visit() sees to the deaths from here on.
    const bool known = visit(chain);
    if (known) frames_proven();
    rollback();
    return known;
}

std::uint32_t CodeTable::intern_stack() noexcept { return profile_->stack(stack_, stack_size_); }

}  // namespace otel_proflink
