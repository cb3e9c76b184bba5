// SPDX-License-Identifier: Apache-2.0
//
// CPython's str objects of every kind, and the location table (Objects/locations.md).
#include <gtest/gtest.h>

#include <initializer_list>

#include "strings.hpp"
#include "support/static_thread.hpp"

namespace otel_proflink::test {
namespace {

class Strings : public testing::Test {
  protected:
    Strings() : memory(1u << 16), abi(make_abi(Layout::py312)) {}

    template <typename Unit>
    std::uintptr_t make(const std::vector<Unit>& units, bool ascii) {
        std::uint64_t* object = memory.allocate(16 + units.size());
        object[abi.object.unicode_length / 8] = units.size();
        const std::uint32_t state = static_cast<std::uint32_t>(sizeof(Unit))
                                        << abi.object.unicode_kind_shift |
                                    1u << abi.object.unicode_compact_shift |
                                    (ascii ? 1u << abi.object.unicode_ascii_shift : 0u);
        std::memcpy(reinterpret_cast<char*>(object) + abi.object.unicode_state, &state, 4);
        const std::uint32_t data =
            ascii ? abi.object.unicode_ascii_data : abi.object.unicode_compact_data;
        if (!units.empty()) {
            std::memcpy(reinterpret_cast<char*>(object) + data, units.data(),
                        units.size() * sizeof(Unit));
        }
        return reinterpret_cast<std::uintptr_t>(object);
    }

    std::uintptr_t ascii(const std::string& text) {
        return make(std::vector<std::uint8_t>(text.begin(), text.end()), true);
    }

    std::string read(std::uintptr_t object) {
        EXPECT_TRUE(read_string(memory, abi, object, &out));
        return {out.data, out.size};
    }

    FlatMemory memory;
    ProflinkAbi abi;
    Utf8 out;
};

TEST_F(Strings, Ascii) {
    EXPECT_EQ(read(ascii("handle.<locals>.inner")), "handle.<locals>.inner");
    EXPECT_EQ(read(ascii("")), "");
    EXPECT_EQ(read(ascii(std::string("nul\0inside", 10))), std::string("nul\0inside", 10));
}

TEST_F(Strings, EachKind) {
    EXPECT_EQ(read(make<std::uint8_t>({'c', 'a', 'f', 0xe9}, false)), "caf\xc3\xa9");
    EXPECT_EQ(read(make<std::uint16_t>({'x', 0x3b4, 0x20ac, 0xffff}, false)),
              "x\xce\xb4\xe2\x82\xac\xef\xbf\xbf");
    EXPECT_EQ(read(make<std::uint32_t>({'x', 0x1d4d0, 0x10ffff}, false)),
              "x\xf0\x9d\x93\x90\xf4\x8f\xbf\xbf");
}

TEST_F(Strings, LoneSurrogatesAndImpossibleCharacters) {
    EXPECT_EQ(read(make<std::uint16_t>({'a', 0xdc80, 'b'}, false)),
              "a\xef\xbf\xbd"
              "b");
    EXPECT_EQ(read(make<std::uint16_t>({0xd83d, 0xde00}, false)), "\xef\xbf\xbd\xef\xbf\xbd");
    EXPECT_EQ(read(make<std::uint32_t>({0xd800, 0x110000, 0xffffffff}, false)),
              "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
}

TEST_F(Strings, LongOnesAreCut) {
    EXPECT_EQ(read(ascii(std::string(kMaxCharacters + 100, 'x'))),
              std::string(kMaxCharacters, 'x'));
    const std::string wide =
        read(make(std::vector<std::uint32_t>(kMaxCharacters + 1, 0x1f600), false));
    EXPECT_EQ(wide.size(), sizeof(out.data));
}

TEST_F(Strings, LengthThatReachesBeyondMemory) {
    const std::uintptr_t object = ascii("short");
    reinterpret_cast<std::uint64_t*>(object)[abi.object.unicode_length / 8] = ~0ull;
    memory.hide(reinterpret_cast<char*>(object) + 512, 1u << 20);
    EXPECT_FALSE(read_string(memory, abi, object, &out));
}

TEST_F(Strings, NotAStringThatWeKnow) {
    EXPECT_FALSE(read_string(memory, abi, 0, &out));
    EXPECT_FALSE(read_string(memory, abi, 0x1230, &out));
    for (const std::uint32_t kind : {0u, 3u, 5u, 6u, 7u}) {
        const std::uintptr_t object = ascii("abc");
        const std::uint32_t state =
            kind << abi.object.unicode_kind_shift | 1u << abi.object.unicode_compact_shift;
        std::memcpy(reinterpret_cast<char*>(object) + abi.object.unicode_state, &state, 4);
        EXPECT_FALSE(read_string(memory, abi, object, &out)) << kind;
    }
    const std::uintptr_t object = ascii("abc");
    const std::uint32_t not_compact = 1u << abi.object.unicode_kind_shift;
    std::memcpy(reinterpret_cast<char*>(object) + abi.object.unicode_state, &not_compact, 4);
    EXPECT_FALSE(read_string(memory, abi, object, &out));
}

// --- Location tables

class Lines : public Strings {
  protected:
    std::uintptr_t table(std::initializer_list<int> bytes, std::uint64_t size = ~0ull) {
        std::uint64_t* object = memory.allocate(8 + bytes.size());
        object[abi.object.bytes_size / 8] = size == ~0ull ? bytes.size() : size;
        auto* data = reinterpret_cast<std::uint8_t*>(object) + abi.object.bytes_data;
        for (const int byte : bytes) *data++ = static_cast<std::uint8_t>(byte);
        return reinterpret_cast<std::uintptr_t>(object);
    }

    static int head(int code, int units) { return 0x80 | code << 3 | (units - 1); }

    // -1000: unreadable.
    std::int32_t line(std::uintptr_t linetable, std::int32_t unit, std::int32_t first = 100) {
        std::int32_t line = 0;
        return read_line(memory, abi, linetable, first, unit, &line) ? line : -1000;
    }
};

TEST_F(Lines, BeforeTheFirstUnit) { EXPECT_EQ(line(0, -1), 100); }

TEST_F(Lines, ShortForms) {
    for (int code = 0; code < 10; ++code) {
        const std::uintptr_t entries = table({head(code, 3), 0x12, head(11, 1), 4, 5});
        EXPECT_EQ(line(entries, 0), 100);
        EXPECT_EQ(line(entries, 2), 100);
        EXPECT_EQ(line(entries, 3), 101);
        EXPECT_EQ(line(entries, 4), -1000);
    }
}

TEST_F(Lines, OneLineForms) {
    const std::uintptr_t entries =
        table({head(10, 1), 1, 2, head(11, 1), 1, 2, head(12, 8), 0xff, 0xff});
    EXPECT_EQ(line(entries, 0), 100);
    EXPECT_EQ(line(entries, 1), 101);
    EXPECT_EQ(line(entries, 2), 103);
    EXPECT_EQ(line(entries, 9), 103);
}

TEST_F(Lines, WithoutColumns) {
    // A signed varint: the lowest bit is the sign, six bits a byte, 64 means that more follow.
    const std::uintptr_t entries = table({head(13, 1), 5 << 1, head(13, 1), (5 << 1) | 1,
                                          head(13, 2), 64 | (1000 << 1 & 63), 1000 << 1 >> 6});
    EXPECT_EQ(line(entries, 0), 105);
    EXPECT_EQ(line(entries, 1), 100);
    EXPECT_EQ(line(entries, 3), 1100);
}

TEST_F(Lines, LongForm) {
    const std::uintptr_t entries =
        table({head(14, 1), 2 << 1, 1, 64 | 9, 3, 64 | 8, 2, head(10, 1), 0, 0});
    EXPECT_EQ(line(entries, 0), 102);
    EXPECT_EQ(line(entries, 1), 102);
}

// Some code has no line: it shows the last one that had.
TEST_F(Lines, NoLocation) {
    const std::uintptr_t entries =
        table({head(15, 2), head(12, 1), 0, 0, head(15, 1), head(11, 1), 0, 0});
    EXPECT_EQ(line(entries, 0), 100);
    EXPECT_EQ(line(entries, 2), 102);
    EXPECT_EQ(line(entries, 3), 102);
    EXPECT_EQ(line(entries, 4), 103);
}

TEST_F(Lines, LongTablesAreReadInWindows) {
    std::uint64_t* object = memory.allocate(2000);
    object[abi.object.bytes_size / 8] = 3 * 3000;
    auto* data = reinterpret_cast<std::uint8_t*>(object) + abi.object.bytes_data;
    for (int i = 0; i < 3000; ++i) {
        *data++ = static_cast<std::uint8_t>(head(11, 1));
        *data++ = 0;
        *data++ = 0;
    }
    const auto entries = reinterpret_cast<std::uintptr_t>(object);
    EXPECT_EQ(line(entries, 2999), 3100);
    EXPECT_LT(memory.calls(), 30u);
    EXPECT_EQ(line(entries, 3000), -1000);
}

TEST_F(Lines, WhatIsNotATable) {
    EXPECT_EQ(line(0, 0), -1000);
    EXPECT_EQ(line(0x1230, 0), -1000);
    EXPECT_EQ(line(table({}), 0), -1000);
    EXPECT_EQ(line(table({0x12, 0x34}), 0), -1000) << "an entry begins with its top bit set";
    EXPECT_EQ(line(table({head(10, 1), 1}), 0), -1000) << "cut short";
    EXPECT_EQ(line(table({head(14, 1), 64}), 0), -1000) << "cut in a varint";
    EXPECT_EQ(line(table({head(13, 1), 127, 127, 127, 127, 127, 127, 127}), 0), -1000)
        << "a varint without an end";
    EXPECT_EQ(line(table({head(13, 1), 127, 127, 127, 127, 127, 3}), 0), -1000) << "a line below 0";
    const std::uintptr_t cut = table({head(15, 8)}, 1u << 20);
    memory.hide(reinterpret_cast<char*>(cut) + 48, 1u << 20);
    EXPECT_EQ(line(cut, 20), -1000);
}

}  // namespace
}  // namespace otel_proflink::test
