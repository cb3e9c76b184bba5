// SPDX-License-Identifier: Apache-2.0
//
// The slab of link records: reuse, serials, reads that race with it.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "link.hpp"
#include "support/effort.hpp"

namespace otel_proflink::test {
namespace {

struct Ids {
    std::uint8_t trace[16];
    std::uint8_t span[8];
    std::uint8_t root[8];
};

// Every byte follows from `seed`, so that a mixture of two records shows.
Ids ids_of(std::uint32_t seed) {
    Ids ids;
    for (std::uint32_t i = 0; i < 16; ++i) ids.trace[i] = static_cast<std::uint8_t>(seed + i);
    for (std::uint32_t i = 0; i < 8; ++i) ids.span[i] = static_cast<std::uint8_t>(seed + 16 + i);
    for (std::uint32_t i = 0; i < 8; ++i) ids.root[i] = static_cast<std::uint8_t>(seed + 24 + i);
    return ids;
}

LinkRecord* make(std::uint32_t seed) {
    const Ids ids = ids_of(seed);
    return link_new(ids.trace, ids.span, ids.root, static_cast<std::uint8_t>(seed + 32),
                    static_cast<std::uint8_t>(seed + 33), kLinkRemote);
}

bool is_whole(const LinkData& data) {
    const std::uint8_t seed = data.trace_id[0];
    const Ids ids = ids_of(seed);
    return std::memcmp(data.trace_id, ids.trace, 16) == 0 &&
           std::memcmp(data.span_id, ids.span, 8) == 0 &&
           std::memcmp(data.local_root_span_id, ids.root, 8) == 0 &&
           data.trace_flags == static_cast<std::uint8_t>(seed + 32) &&
           data.span_type == static_cast<std::uint8_t>(seed + 33);
}

std::uintptr_t address_of(const LinkRecord* record) {
    return reinterpret_cast<std::uintptr_t>(record);
}

// --- Totals

class LinkTotalsTest : public testing::Test {
  protected:
    ~LinkTotalsTest() override {
        for (LinkRecord* record : records) link_free(record);
    }
    LinkRecord* keep(LinkRecord* record) {
        records.push_back(record);
        return record;
    }
    LinkRecord* root() {
        const Ids ids = ids_of(1);
        return keep(link_new(ids.trace, ids.span, ids.span, 0, 0, 0));
    }
    LinkRecord* child(const LinkRecord* parent) {
        const Ids ids = ids_of(++seed);
        return keep(link_new(ids.trace, ids.span, parent->local_root_span_id, 0, 0, 0, parent));
    }
    static LinkData data_of(const LinkRecord* record) {
        LinkData data{};
        EXPECT_TRUE(link_read(address_of(record), record->serial.load(), &data));
        return data;
    }

    std::vector<LinkRecord*> records;
    std::uint32_t seed = 1;
    LinkTotals own, below;
};

TEST_F(LinkTotalsTest, NothingUntilASample) {
    LinkRecord* a = root();
    EXPECT_FALSE(link_totals(a, &own, &below));
    EXPECT_EQ(a->sampled.load(), 0);
}

TEST_F(LinkTotalsTest, OwnAndLocalRoot) {
    LinkRecord* a = root();
    LinkRecord* b = child(a);
    LinkRecord* c = child(b);
    link_account(data_of(a), {1, 2, 3, 4});
    link_account(data_of(c), {10, 20, 30, 40});
    link_account(data_of(c), {100, 200, 300, 400});
    ASSERT_TRUE(link_totals(a, &own, &below));
    EXPECT_EQ(own.samples, 1u);
    EXPECT_EQ(below.samples, 111u);
    EXPECT_EQ(below.cpu_ns, 222u);
    EXPECT_EQ(below.wall_ns, 333u);
    EXPECT_EQ(below.gil_wait_ns, 444u);
    EXPECT_FALSE(link_totals(b, &own, &below));
    ASSERT_TRUE(link_totals(c, &own, &below));
    EXPECT_EQ(own.cpu_ns, 220u);
    EXPECT_EQ(below.samples, 0u) << "not a local root";
}

TEST_F(LinkTotalsTest, ALateSampleIsNobodyElses) {
    LinkRecord* a = root();
    const LinkData late = data_of(a);
    link_account(late, {5, 5, 5, 5});
    link_free(a);
    records.clear();
    LinkRecord* b = root();
    ASSERT_EQ(b, a) << "the test is about a record that is used again";
    EXPECT_FALSE(link_totals(b, &own, &below));
    link_account(late, {5, 5, 5, 5});
    EXPECT_FALSE(link_totals(b, &own, &below));
    link_account(data_of(b), {1, 0, 0, 0});
    ASSERT_TRUE(link_totals(b, &own, &below));
    EXPECT_EQ(own.samples, 1u);
}

TEST_F(LinkTotalsTest, ARootThatEndedFirst) {
    LinkRecord* a = root();
    LinkRecord* b = child(a);
    link_free(a);
    records.erase(records.begin());
    LinkRecord* other = root();
    ASSERT_EQ(other, a);
    link_account(data_of(b), {1, 1, 1, 1});
    EXPECT_FALSE(link_totals(other, &own, &below)) << "the totals of another trace";
    EXPECT_TRUE(link_totals(b, &own, &below));
}

TEST_F(LinkTotalsTest, ARootOfAnotherProcess) {
    LinkRecord* a = keep(make(9));
    link_account(data_of(a), {1, 1, 1, 1});
    ASSERT_TRUE(link_totals(a, &own, &below));
    EXPECT_EQ(below.samples, 0u);
}

TEST(Link, ReadsBackWhatWasWritten) {
    LinkRecord* record = make(7);
    ASSERT_NE(record, nullptr);
    EXPECT_EQ(address_of(record) % 64, 0u);
    EXPECT_EQ(record->flags, kLinkRemote);
    LinkData data{};
    ASSERT_TRUE(link_read(address_of(record), record->serial.load(), &data));
    EXPECT_EQ(data.trace_id[0], 7);
    EXPECT_TRUE(is_whole(data));
    link_free(record);
}

TEST(Link, RecordsAreReusedAndSerialsAreNot) {
    LinkRecord* first = make(1);
    const std::uint64_t serial = first->serial.load();
    link_free(first);
    EXPECT_EQ(first->serial.load(), 0u);
    LinkData data{};
    EXPECT_FALSE(link_read(address_of(first), serial, &data));
    EXPECT_FALSE(link_read(address_of(first), 0, &data)) << "0 means free";
    LinkRecord* second = make(2);
    EXPECT_EQ(second, first) << "last freed, first reused";
    EXPECT_GT(second->serial.load(), serial);
    EXPECT_FALSE(link_read(address_of(second), serial, &data));
    EXPECT_TRUE(link_read(address_of(second), second->serial.load(), &data));
    link_free(second);
}

TEST(Link, AnyAddressMayBeAskedFor) {
    LinkRecord* record = make(3);
    const std::uint64_t serial = record->serial.load();
    LinkData data{};
    for (const std::uintptr_t wild :
         {std::uintptr_t{0}, std::uintptr_t{1}, std::uintptr_t{0x1000}, ~std::uintptr_t{0},
          address_of(record) + 1, address_of(record) + 8, address_of(record) + 32,
          address_of(record) - (std::uintptr_t{1} << 30),
          reinterpret_cast<std::uintptr_t>(&data)}) {
        EXPECT_FALSE(link_read(wild, serial, &data)) << std::hex << wild;
    }
    link_free(record);
    link_free(reinterpret_cast<LinkRecord*>(&data));  // not ours: left alone
}

TEST(Link, ManyChunks) {
    const std::uint64_t live = link_live();
    std::vector<LinkRecord*> records;
    std::set<std::uint64_t> serials;
    for (std::uint32_t i = 0; i < 20000; ++i) {
        records.push_back(make(i));
        ASSERT_NE(records.back(), nullptr);
        serials.insert(records.back()->serial.load());
    }
    EXPECT_EQ(serials.size(), records.size());
    EXPECT_EQ(link_live(), live + records.size());
    LinkData data{};
    for (std::uint32_t i = 0; i < records.size(); ++i) {
        ASSERT_TRUE(link_read(address_of(records[i]), records[i]->serial.load(), &data));
        ASSERT_EQ(data.trace_id[0], static_cast<std::uint8_t>(i));
    }
    for (LinkRecord* record : records) link_free(record);
    EXPECT_EQ(link_live(), live);
}

// Makers and a reader that is always late: what it gets is whole, and the record that it meant.
TEST(Link, ConcurrentMakersAndReaders) {
    constexpr int kMakers = 3;
    struct alignas(64) Shown {
        std::atomic<LinkRecord*> record{nullptr};
        std::atomic<std::uint64_t> serial{0};
        std::atomic<std::uint32_t> seed{0};
    };
    Shown shown[kMakers];
    std::atomic<bool> stop{false};
    const std::uint64_t live = link_live();
    std::vector<std::thread> makers;
    const std::uint64_t rounds = scaled(50'000);
    for (int m = 0; m < kMakers; ++m) {
        makers.emplace_back([&, m] {
            for (std::uint64_t i = 0; i < rounds; ++i) {
                LinkRecord* record =
                    make(static_cast<std::uint32_t>(i * kMakers) + static_cast<std::uint32_t>(m));
                LinkRecord* second = make(77);
                shown[m].record.store(record);
                shown[m].serial.store(record->serial.load());
                link_free(record);
                link_free(second);
            }
        });
    }
    std::uint64_t reads = 0;
    std::thread reader([&] {
        while (!stop.load()) {
            for (Shown& each : shown) {
                LinkData data{};
                const std::uint64_t serial = each.serial.load();
                if (!link_read(address_of(each.record.load()), serial, &data)) continue;
                ASSERT_TRUE(is_whole(data));
                ++reads;
            }
        }
    });
    for (std::thread& maker : makers) maker.join();
    stop.store(true);
    reader.join();
    EXPECT_EQ(link_live(), live);
}

TEST(Link, NoTwoThreadsGetOneRecord) {
    constexpr int kThreads = 4;
    std::vector<std::vector<LinkRecord*>> taken(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            std::vector<LinkRecord*>& mine = taken[static_cast<std::size_t>(t)];
            for (int i = 0; i < 5000; ++i) {
                mine.push_back(make(static_cast<std::uint32_t>(t)));
                if (i % 3 == 0) {
                    link_free(mine.back());
                    mine.pop_back();
                }
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    std::set<LinkRecord*> all;
    std::size_t count = 0;
    for (const auto& mine : taken) {
        count += mine.size();
        all.insert(mine.begin(), mine.end());
        for (LinkRecord* record : mine) link_free(record);
    }
    EXPECT_EQ(all.size(), count);
}

TEST(SpanTypes, AreInterned) {
    const std::uint8_t web = span_type_intern("web", 3);
    EXPECT_NE(web, 0);
    EXPECT_EQ(span_type_intern("web", 3), web);
    EXPECT_EQ(span_type_intern("webs", 3), web);
    EXPECT_NE(span_type_intern("webs", 4), web);
    EXPECT_STREQ(span_type_text(web), "web");
    EXPECT_EQ(span_type_intern("", 0), 0);
    EXPECT_STREQ(span_type_text(0), "");
    EXPECT_STREQ(span_type_text(255), "");
    const std::string longer(40, 'x');
    const std::uint8_t cut = span_type_intern(longer.data(), 40);
    EXPECT_STREQ(span_type_text(cut), longer.substr(0, 31).c_str());
    EXPECT_EQ(span_type_intern(longer.data(), 31), cut);
}

// Without the GIL several threads may meet the same new type at the same time.
TEST(SpanTypes, AreInternedByManyThreads) {
    constexpr int kTypes = 40;
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < 2000; ++i) {
                const std::string text = "type" + std::to_string(i % kTypes);
                const std::uint8_t number =
                    span_type_intern(text.data(), static_cast<std::uint32_t>(text.size()));
                if (number == 0 || text != span_type_text(number)) ++wrong;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
}

TEST(SpanTypes, AFullTableGivesNone) {
    for (int i = 0; i < 300; ++i) {
        const std::string text = "type" + std::to_string(i);
        const std::uint8_t number =
            span_type_intern(text.data(), static_cast<std::uint32_t>(text.size()));
        if (number != 0) {
            EXPECT_EQ(span_type_text(number), text);
        }
    }
    EXPECT_EQ(span_type_intern("one more", 8), 0);
    EXPECT_NE(span_type_intern("type1", 5), 0);
}

}  // namespace
}  // namespace otel_proflink::test
