// SPDX-License-Identifier: Apache-2.0
#include "profile.hpp"

#include <cstdlib>
#include <new>

namespace otel_proflink {
namespace {

// One interval's budget. Reserved address space, about 60 MB; a usual profile touches 1 to 3 MB.
// The exporter swaps early at three quarters, so an overflow means a burst within a second.
constexpr std::uint32_t kMaxText = 8u << 20;
constexpr std::uint32_t kMaxStrings = 1u << 16;
constexpr std::uint32_t kMaxFunctions = 1u << 16;
constexpr std::uint32_t kMaxLocations = 1u << 18;
constexpr std::uint32_t kMaxFrameSlots = 1u << 22;
constexpr std::uint32_t kMaxStacks = 1u << 17;
constexpr std::uint32_t kMaxLinks = 1u << 17;
constexpr std::uint32_t kMaxThreads = 1u << 15;
constexpr std::uint32_t kMaxSamples = 1u << 18;

constexpr char kOverflowName[] = "[profile tables full]";

}  // namespace

Profile* Profile::create(std::uint64_t period_ns) noexcept {
    void* memory = std::calloc(1, sizeof(Profile));
    if (memory == nullptr) return nullptr;
    auto* profile = new (memory) Profile();
    if (!profile->reserve()) {
        profile_free(profile);
        return nullptr;
    }
    profile->period_ns = period_ns;
    return profile;
}

void profile_free(Profile* profile) noexcept {
    if (profile == nullptr) return;
    profile->~Profile();
    std::free(profile);
}

bool Profile::reserve() noexcept {
    if (!text.reserve(kMaxText) || !strings.reserve(kMaxStrings) ||
        !functions.reserve(kMaxFunctions) || !locations.reserve(kMaxLocations) ||
        !frames.reserve(kMaxFrameSlots) || !stacks.reserve(kMaxStacks) ||
        !links.reserve(kMaxLinks) || !threads.reserve(kMaxThreads) ||
        !samples.reserve(kMaxSamples) || !string_index_.reserve(kMaxStrings) ||
        !function_index_.reserve(kMaxFunctions) || !location_index_.reserve(kMaxLocations) ||
        !stack_index_.reserve(kMaxStacks) || !link_index_.reserve(kMaxLinks) ||
        !thread_index_.reserve(kMaxThreads) || !sample_index_.reserve(kMaxSamples)) {
        return false;
    }
    // Entry 0 of each table stands for what found no room.
    string("", 0);
    const std::uint32_t name = string(kOverflowName, sizeof(kOverflowName) - 1);
    const std::uint32_t place = location(function(name, 0, 0), 0);
    stack(&place, 1);
    return true;
}

template <typename T, typename Equal>
std::uint32_t Profile::intern(Index& index, Table<T>& table, std::uint64_t hash, const T& item,
                              Equal equal) noexcept {
    std::uint32_t slot;
    std::uint32_t entry = index.find(hash, equal, &slot);
    if (entry != kNoEntry) return entry;
    entry = table.add(item);
    if (entry == kNoEntry) {
        ++overflows;
        return kNoEntry;
    }
    index.set(slot, entry);
    return entry;
}

namespace {
std::uint32_t or_zero(std::uint32_t entry) noexcept { return entry == kNoEntry ? 0 : entry; }
std::uint64_t pair(std::uint64_t a, std::uint64_t b) noexcept { return mix(mix(a) ^ b); }
}  // namespace

std::uint32_t Profile::string(const char* data, std::uint32_t size) noexcept {
    std::uint32_t slot;
    const std::uint32_t found = string_index_.find(
        hash_bytes(data, size),
        [&](std::uint32_t i) {
            return strings[i].size == size &&
                   std::memcmp(&text[strings[i].offset], data, size) == 0;
        },
        &slot);
    if (found != kNoEntry) return found;
    const std::uint32_t offset = strings.full() ? kNoEntry : text.add_many(data, size);
    if (offset == kNoEntry) {
        ++overflows;
        return 0;
    }
    const std::uint32_t entry = strings.add({offset, size});
    string_index_.set(slot, entry);
    return entry;
}

std::uint32_t Profile::function(std::uint32_t name, std::uint32_t file,
                                std::int32_t line) noexcept {
    const Function item{name, file, line};
    return or_zero(intern(function_index_, functions,
                          pair(pair(name, file), static_cast<std::uint32_t>(line)), item,
                          [&](std::uint32_t i) {
                              const Function& f = functions[i];
                              return f.name == name && f.file == file && f.first_line == line;
                          }));
}

std::uint32_t Profile::location(std::uint32_t function, std::int32_t line) noexcept {
    const Location item{function, line};
    return or_zero(intern(location_index_, locations,
                          pair(function, static_cast<std::uint32_t>(line)), item,
                          [&](std::uint32_t i) {
                              return locations[i].function == function && locations[i].line == line;
                          }));
}

std::uint32_t Profile::stack(const std::uint32_t* ids, std::uint32_t count) noexcept {
    std::uint32_t slot;
    const std::size_t bytes = count * sizeof(std::uint32_t);
    const std::uint32_t found = stack_index_.find(
        hash_bytes(ids, bytes),
        [&](std::uint32_t i) {
            return stacks[i].count == count &&
                   std::memcmp(&frames[stacks[i].first], ids, bytes) == 0;
        },
        &slot);
    if (found != kNoEntry) return found;
    const std::uint32_t first = stacks.full() ? kNoEntry : frames.add_many(ids, count);
    if (first == kNoEntry) {
        ++overflows;
        return 0;
    }
    const std::uint32_t entry = stacks.add({first, count});
    stack_index_.set(slot, entry);
    return entry;
}

std::uint32_t Profile::link(const LinkData& link) noexcept {
    std::uint64_t hash = hash_bytes(link.trace_id, sizeof(link.trace_id));
    hash = mix(hash ^ hash_bytes(link.span_id, sizeof(link.span_id)));
    const std::uint32_t entry = intern(link_index_, links, hash, link, [&](std::uint32_t i) {
        const LinkData& other = links[i];
        return std::memcmp(other.trace_id, link.trace_id, 16) == 0 &&
               std::memcmp(other.span_id, link.span_id, 8) == 0 &&
               std::memcmp(other.local_root_span_id, link.local_root_span_id, 8) == 0 &&
               other.trace_flags == link.trace_flags && other.span_type == link.span_type;
    });
    return entry == kNoEntry ? kUnknownLink : entry;
}

std::uint32_t Profile::thread(std::uint64_t id, std::int32_t tid) noexcept {
    const ProfiledThread item{id, tid, 0, 0, false};
    return intern(thread_index_, threads, pair(id, static_cast<std::uint32_t>(tid)), item,
                  [&](std::uint32_t i) { return threads[i].id == id && threads[i].tid == tid; });
}

std::uint32_t Profile::sample(std::uint32_t stack, std::uint32_t link, std::uint32_t thread,
                              ThreadState state, std::uint64_t task) noexcept {
    const Sample item{stack, link, thread, state, task, 0, 0, 0, 0};
    const std::uint64_t hash =
        pair(pair(stack, link), pair(thread, task << 2 ^ static_cast<std::uint64_t>(state)));
    return intern(sample_index_, samples, hash, item, [&](std::uint32_t i) {
        const Sample& s = samples[i];
        return s.stack == stack && s.link == link && s.thread == thread && s.state == state &&
               s.task == task;
    });
}

std::uint32_t Profile::marker_stack(const char* name) noexcept {
    const std::uint32_t text_id = string(name, static_cast<std::uint32_t>(std::strlen(name)));
    const std::uint32_t place = location(function(text_id, 0, 0), 0);
    return stack(&place, 1);
}

float Profile::fill() const noexcept {
    const float fills[] = {text.fill(),      strings.fill(), functions.fill(),
                           locations.fill(), frames.fill(),  stacks.fill(),
                           links.fill(),     threads.fill(), samples.fill()};
    float most = 0;
    for (const float fill : fills) most = fill > most ? fill : most;
    return most;
}

std::uint64_t Profile::resident() const noexcept {
    return text.resident() + strings.resident() + functions.resident() + locations.resident() +
           frames.resident() + stacks.resident() + links.resident() + threads.resident() +
           samples.resident() + string_index_.resident() + function_index_.resident() +
           location_index_.resident() + stack_index_.resident() + link_index_.resident() +
           thread_index_.resident() + sample_index_.resident();
}

}  // namespace otel_proflink
