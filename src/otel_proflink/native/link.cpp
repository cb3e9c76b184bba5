// SPDX-License-Identifier: Apache-2.0
#include "link.hpp"

#include <sys/mman.h>

#include <cstring>

#include "resident.hpp"

namespace otel_proflink {
namespace {

// 4096 records of 64 bytes: a chunk is 256 KiB, small beside the process and rare enough to map.
constexpr std::uint32_t kChunkRecords = 4096;
// 16.7 million live spans. Beyond it spans simply have no link.
constexpr std::uint32_t kMaxChunks = 4096;
constexpr std::uint32_t kNone = kNoRecord;

// One writer; readers may see the parts of a sum at different instants, never a torn number.
struct Sums {
    std::atomic<std::uint64_t> samples, cpu_ns, wall_ns, gil_wait_ns;

    void clear() noexcept {
        for (auto* sum : {&samples, &cpu_ns, &wall_ns, &gil_wait_ns}) {
            sum->store(0, std::memory_order_relaxed);
        }
    }
    void add(const LinkTotals& share) noexcept {
        samples.store(samples.load(std::memory_order_relaxed) + share.samples,
                      std::memory_order_relaxed);
        cpu_ns.store(cpu_ns.load(std::memory_order_relaxed) + share.cpu_ns,
                     std::memory_order_relaxed);
        wall_ns.store(wall_ns.load(std::memory_order_relaxed) + share.wall_ns,
                      std::memory_order_relaxed);
        gil_wait_ns.store(gil_wait_ns.load(std::memory_order_relaxed) + share.gil_wait_ns,
                          std::memory_order_relaxed);
    }
    LinkTotals get() const noexcept {
        return {samples.load(std::memory_order_relaxed), cpu_ns.load(std::memory_order_relaxed),
                wall_ns.load(std::memory_order_relaxed),
                gil_wait_ns.load(std::memory_order_relaxed)};
    }
};

// The totals of a record, apart from it: most spans are over before a tick, and touch only theirs.
struct Account {
    std::atomic<std::uint64_t> serial;  // of the record that the sums are for
    Sums own, below;
};

std::atomic<Account*> g_accounts[kMaxChunks];
std::atomic<LinkRecord*> g_chunks[kMaxChunks];
std::atomic<std::uint32_t> g_used{0};  // records ever handed out by bumping
std::atomic<std::uint64_t> g_serial{1};
std::atomic<std::uint64_t> g_live{0};
// Head of the free list: low half the index, high half a tag against ABA.
std::atomic<std::uint64_t> g_free{kNone};

LinkRecord* record_at(std::uint32_t index) noexcept {
    LinkRecord* chunk = g_chunks[index / kChunkRecords].load(std::memory_order_acquire);
    return chunk + index % kChunkRecords;
}

LinkRecord* pop_free(std::uint32_t* taken) noexcept {
    std::uint64_t head = g_free.load(std::memory_order_acquire);
    for (;;) {
        const auto index = static_cast<std::uint32_t>(head);
        if (index == kNone) return nullptr;
        LinkRecord* record = record_at(index);
        // May be stale when another thread took the record: the tag makes the exchange fail then.
        const std::uint32_t next = __atomic_load_n(&record->next_free, __ATOMIC_RELAXED);
        const std::uint64_t want = ((head >> 32) + 1) << 32 | next;
        if (g_free.compare_exchange_weak(head, want, std::memory_order_acq_rel)) {
            *taken = index;
            return record;
        }
    }
}

LinkRecord* bump(std::uint32_t* taken) noexcept {
    std::uint32_t index = g_used.load(std::memory_order_relaxed);
    do {
        if (index >= kChunkRecords * kMaxChunks) return nullptr;
    } while (!g_used.compare_exchange_weak(index, index + 1, std::memory_order_relaxed));

    std::atomic<LinkRecord*>& place = g_chunks[index / kChunkRecords];
    if (place.load(std::memory_order_acquire) == nullptr) {
        void* memory = mmap(nullptr, sizeof(LinkRecord) * kChunkRecords, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;  // the index is lost, nothing else
        LinkRecord* expected = nullptr;
        if (!place.compare_exchange_strong(expected, static_cast<LinkRecord*>(memory),
                                           std::memory_order_acq_rel)) {
            munmap(memory, sizeof(LinkRecord) * kChunkRecords);  // never published
        }
    }
    *taken = index;
    return record_at(index);
}

// The index of the record at `address`, or kNone if no record begins there.
std::uint32_t index_of(std::uintptr_t address) noexcept {
    const std::uint32_t used = g_used.load(std::memory_order_acquire);
    const std::uint32_t chunks = (used + kChunkRecords - 1) / kChunkRecords;
    for (std::uint32_t i = 0; i < chunks; ++i) {
        const auto base =
            reinterpret_cast<std::uintptr_t>(g_chunks[i].load(std::memory_order_acquire));
        if (base == 0 || address < base) continue;
        const std::uintptr_t offset = address - base;
        if (offset >= sizeof(LinkRecord) * kChunkRecords) continue;
        if (offset % sizeof(LinkRecord) != 0) return kNone;
        return i * kChunkRecords + static_cast<std::uint32_t>(offset / sizeof(LinkRecord));
    }
    return kNone;
}

constexpr std::uint32_t kMaxTypes = 256;
constexpr std::uint32_t kMaxTypeSize = 31;
enum TypeState : std::uint8_t { kUnused, kBeingWritten, kWritten };
struct SpanType {
    std::atomic<std::uint8_t> state;
    char text[kMaxTypeSize + 1];
};
SpanType g_types[kMaxTypes];  // index 0: no type

}  // namespace

LinkRecord* link_new(const std::uint8_t trace_id[16], const std::uint8_t span_id[8],
                     const std::uint8_t local_root_span_id[8], std::uint8_t trace_flags,
                     std::uint8_t span_type, std::uint8_t flags,
                     const LinkRecord* parent) noexcept {
    std::uint32_t index = 0;
    LinkRecord* record = pop_free(&index);
    if (record == nullptr) record = bump(&index);
    if (record == nullptr) return nullptr;
    const std::uint64_t serial = g_serial.fetch_add(1, std::memory_order_relaxed);
    std::memcpy(record->trace_id, trace_id, 16);
    std::memcpy(record->span_id, span_id, 8);
    std::memcpy(record->local_root_span_id, local_root_span_id, 8);
    record->trace_flags = trace_flags;
    record->span_type = span_type;
    record->flags = flags;
    record->sampled.store(0, std::memory_order_relaxed);
    record->name = 0;
    if (parent != nullptr) {
        record->root = parent->root;
        record->root_serial = parent->root_serial;
    } else if (std::memcmp(span_id, local_root_span_id, 8) == 0) {
        record->root = index;
        record->root_serial = serial;
    } else {
        record->root = kNoRecord;
        record->root_serial = 0;
    }
    record->serial.store(serial, std::memory_order_release);
    g_live.fetch_add(1, std::memory_order_relaxed);
    return record;
}

void link_free(LinkRecord* record) noexcept {
    const std::uint32_t index = index_of(reinterpret_cast<std::uintptr_t>(record));
    if (index == kNone) return;
    record->serial.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);  // readers see 0 before any new content
    std::uint64_t head = g_free.load(std::memory_order_relaxed);
    std::uint64_t want;
    do {
        __atomic_store_n(&record->next_free, static_cast<std::uint32_t>(head), __ATOMIC_RELAXED);
        want = ((head >> 32) + 1) << 32 | index;
    } while (!g_free.compare_exchange_weak(head, want, std::memory_order_acq_rel));
    g_live.fetch_sub(1, std::memory_order_relaxed);
}

// The copy races with a thread that frees and refills the record; the serial, read before and
// after, decides. Not instrumented, because the race is the protocol.
__attribute__((no_sanitize("thread"))) bool link_read(std::uintptr_t address, std::uint64_t serial,
                                                      LinkData* out) noexcept {
    if (serial == 0) return false;
    const std::uint32_t index = index_of(address);
    if (index == kNone) return false;
    const LinkRecord* record = record_at(index);
    if (record->serial.load(std::memory_order_acquire) != serial) return false;
    const volatile LinkRecord* racy = record;
    for (int i = 0; i < 16; ++i) out->trace_id[i] = racy->trace_id[i];
    for (int i = 0; i < 8; ++i) out->span_id[i] = racy->span_id[i];
    for (int i = 0; i < 8; ++i) out->local_root_span_id[i] = racy->local_root_span_id[i];
    out->trace_flags = racy->trace_flags;
    out->span_type = racy->span_type;
    out->name = racy->name;
    out->record = index;
    out->root = racy->root;
    out->serial = serial;
    out->root_serial = racy->root_serial;
    std::atomic_thread_fence(std::memory_order_acquire);
    return record->serial.load(std::memory_order_relaxed) == serial;
}

namespace {

// nullptr: no memory, or the record is another one's by now.
Account* account_of(std::uint32_t index, std::uint64_t serial) noexcept {
    if (index >= g_used.load(std::memory_order_acquire)) return nullptr;
    if (g_chunks[index / kChunkRecords].load(std::memory_order_acquire) == nullptr) return nullptr;
    LinkRecord* record = record_at(index);
    if (record->serial.load(std::memory_order_acquire) != serial) return nullptr;
    std::atomic<Account*>& place = g_accounts[index / kChunkRecords];
    Account* chunk = place.load(std::memory_order_relaxed);  // only the caller's thread stores it
    if (chunk == nullptr) {
        void* memory = mmap(nullptr, sizeof(Account) * kChunkRecords, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        chunk = static_cast<Account*>(memory);
        place.store(chunk, std::memory_order_release);
    }
    Account* account = chunk + index % kChunkRecords;
    if (account->serial.load(std::memory_order_relaxed) != serial) {
        // Not readable for the record's owner until all of it is its own.
        account->serial.store(0, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_release);
        account->own.clear();
        account->below.clear();
        account->serial.store(serial, std::memory_order_release);
    }
    record->sampled.store(1, std::memory_order_release);
    return account;
}

}  // namespace

void link_account(const LinkData& link, const LinkTotals& share) noexcept {
    if (Account* account = account_of(link.record, link.serial)) account->own.add(share);
    if (link.root == kNoRecord) return;
    if (Account* account = account_of(link.root, link.root_serial)) account->below.add(share);
}

bool link_totals(const LinkRecord* record, LinkTotals* own, LinkTotals* below) noexcept {
    if (record->sampled.load(std::memory_order_acquire) == 0) return false;
    const std::uint32_t index = index_of(reinterpret_cast<std::uintptr_t>(record));
    if (index == kNone) return false;
    const Account* chunk = g_accounts[index / kChunkRecords].load(std::memory_order_acquire);
    if (chunk == nullptr) return false;
    const Account& account = chunk[index % kChunkRecords];
    if (account.serial.load(std::memory_order_acquire) !=
        record->serial.load(std::memory_order_relaxed)) {
        return false;
    }
    *own = account.own.get();
    *below = account.below.get();
    return own->samples != 0 || below->samples != 0;
}

std::uint64_t link_live() noexcept { return g_live.load(std::memory_order_relaxed); }

std::uint64_t link_resident() noexcept {
    std::uint64_t bytes = 0;
    for (std::uint32_t i = 0; i < kMaxChunks; ++i) {
        const LinkRecord* records = g_chunks[i].load(std::memory_order_acquire);
        if (records == nullptr) break;  // they are mapped in turn
        bytes += resident_bytes(records, sizeof(LinkRecord) * kChunkRecords);
        const Account* accounts = g_accounts[i].load(std::memory_order_acquire);
        if (accounts != nullptr) {
            bytes += resident_bytes(accounts, sizeof(Account) * kChunkRecords);
        }
    }
    return bytes;
}

// A place is claimed, written, and only then compared with: two threads that meet a new type at the
// same time may use two places for it, which say the same.
std::uint8_t span_type_intern(const char* text, std::uint32_t size) noexcept {
    if (size == 0) return 0;
    if (size > kMaxTypeSize) size = kMaxTypeSize;
    for (std::uint32_t i = 1; i < kMaxTypes; ++i) {
        SpanType& type = g_types[i];
        std::uint8_t state = type.state.load(std::memory_order_acquire);
        if (state == kUnused &&
            type.state.compare_exchange_strong(state, kBeingWritten, std::memory_order_acq_rel,
                                               std::memory_order_acquire)) {
            std::memcpy(type.text, text, size);
            type.text[size] = '\0';
            type.state.store(kWritten, std::memory_order_release);
            return static_cast<std::uint8_t>(i);
        }
        if (state == kWritten && std::strncmp(type.text, text, size) == 0 &&
            type.text[size] == '\0') {
            return static_cast<std::uint8_t>(i);
        }
    }
    return 0;
}

const char* span_type_text(std::uint8_t index) noexcept {
    const SpanType& type = g_types[index];
    return type.state.load(std::memory_order_acquire) == kWritten ? type.text : "";
}

}  // namespace otel_proflink
