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

void DeadCodes::push(std::uintptr_t code) noexcept {
    const std::uint64_t at = head_.fetch_add(1, std::memory_order_acq_rel);
    ring_[at % kCapacity].store(code, std::memory_order_release);
}

std::uint32_t DeadCodes::drain(std::uintptr_t* out, std::uint32_t capacity) noexcept {
    const std::uint64_t head = head_.load(std::memory_order_acquire);
    const std::uint64_t count = head - tail_;
    if (count > kCapacity || count > capacity) {
        tail_ = head;
        return kNoEntry;
    }
    for (std::uint64_t i = 0; i < count; ++i) {
        // A place is taken before it is written: wait for neither, distrust all instead.
        const std::uintptr_t code =
            ring_[(tail_ + i) % kCapacity].exchange(0, std::memory_order_acq_rel);
        if (code == 0) {
            tail_ = head;
            return kNoEntry;
        }
        out[i] = code;
    }
    tail_ = head;
    return static_cast<std::uint32_t>(count);
}

bool CodeTable::begin(Profile* profile, bool watched) noexcept {
    profile_ = profile;
    watched_ = watched;
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
    if (!watched_) return true;
    const std::uint32_t count = g_dead.drain(drained_, DeadCodes::kCapacity);
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
    header->type = load<std::uintptr_t>(raw + abi_.object.object_type);
    header->filename = load<std::uintptr_t>(raw + at.filename);
    header->name = load<std::uintptr_t>(raw + at.name);
    header->qualname = load<std::uintptr_t>(raw + at.qualname);
    header->linetable = load<std::uintptr_t>(raw + at.linetable);
    header->units = load<std::uint64_t>(raw + at.units);
    header->first_line = load<std::int32_t>(raw + at.first_line);
    std::uint64_t print = mix(header->filename);
    print = mix(print ^ header->name);
    print = mix(print ^ header->qualname);
    print = mix(print ^ header->linetable);
    print = mix(print ^ header->units);
    header->fingerprint = mix(print ^ static_cast<std::uint32_t>(header->first_line));
    return header->type == abi_.code_type && header->units != 0 && header->units < (1u << 28);
}

// Addresses of strings are handed out again too: what the strings say goes into the fingerprint.
bool CodeTable::fingerprint_names(Header* header) noexcept {
    std::uint64_t hashes[2] = {};
    std::uint64_t lengths[2] = {};
    const ReadRequest requests[] = {
        {header->name + abi_.object.unicode_hash, &hashes[0], 8},
        {header->qualname + abi_.object.unicode_hash, &hashes[1], 8},
        {header->filename + abi_.object.unicode_length, &lengths[0], 8},
        {header->linetable + abi_.object.bytes_size, &lengths[1], 8},
    };
    if (!memory_.read(requests, 4)) return false;
    std::uint64_t print = header->fingerprint;
    for (const std::uint64_t word : {hashes[0], hashes[1], lengths[0], lengths[1]}) {
        print = mix(print ^ word);
    }
    header->fingerprint = print;
    return true;
}

std::uint32_t CodeTable::lookup(std::uintptr_t code) noexcept {
    std::uint32_t slot;
    const std::uint32_t entry = entry_index_.find(
        mix(code), [&](std::uint32_t i) { return entries_[i].code == code; }, &slot);
    if (entry != kNoEntry && entries_[entry].live) {
        if (watched_) return entry;
        Header now;
        if (!read_header(code, &now) || !fingerprint_names(&now)) return kNoEntry;
        if (now.fingerprint == entries_[entry].fingerprint) return entry;
        entries_[entry].live = false;
    }
    return learn(code);
}

std::uint32_t CodeTable::learn(std::uintptr_t code) noexcept {
    Header header;
    if (!read_header(code, &header) || !fingerprint_names(&header)) return kNoEntry;
    if (!read_string(memory_, abi_, header.qualname, &name_) ||
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
    made.fingerprint = header.fingerprint;
    made.linetable = header.linetable;
    made.units = static_cast<std::uint32_t>(header.units);
    made.first_line = header.first_line;
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

bool CodeTable::locate(const Frame& frame, std::uint32_t* location) noexcept {
    const std::uint32_t entry = lookup(frame.code);
    if (entry == kNoEntry) {
        if (!entries_.full()) return false;
        *location = 0;
        return true;
    }
    const Entry& code = entries_[entry];
    const auto distance =
        static_cast<std::int64_t>(frame.instruction - (frame.code + abi_.code.size));
    if (distance % 2 != 0) return false;
    const std::int64_t unit = distance / 2;
    if (unit < abi_.code.first_instruction || unit >= static_cast<std::int64_t>(code.units)) {
        return false;
    }
    std::uint32_t slot;
    const auto key = static_cast<std::int32_t>(unit);
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

bool CodeTable::visit(const Chain& chain) noexcept {
    stack_size_ = 0;
    for (std::uint32_t i = 0; i < chain.count; ++i) {
        if (chain.omitted != 0 && i == kMaxFrames / 2) {
            char text[64];
            std::snprintf(text, sizeof(text), "[%u frames omitted]", chain.omitted);
            const std::uint32_t name =
                profile_->string(text, static_cast<std::uint32_t>(std::strlen(text)));
            stack_[stack_size_++] = profile_->location(profile_->function(name, 0, 0), 0);
        }
        if (!locate(chain.frames[i], &stack_[stack_size_++])) return false;
    }
    return drain(&chain);
}

std::uint32_t CodeTable::intern_stack() noexcept { return profile_->stack(stack_, stack_size_); }

}  // namespace otel_proflink
