// SPDX-License-Identifier: Apache-2.0
//
// The bytes of a tiny profile, written out by hand from profile.proto and the wire format.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <string_view>

#include "pprof.hpp"

namespace otel_proflink::test {
namespace {

struct FreeProfile {
    void operator()(Profile* profile) const { profile_free(profile); }
};

// A length-delimited field; all of these have short contents and small numbers.
std::string nested(int number, const std::string& content) {
    EXPECT_LT(content.size(), 128u);
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(content.size())} +
           content;
}

std::string bytes(std::initializer_list<int> values) {
    std::string out;
    for (const int value : values) out.push_back(static_cast<char>(value));
    return out;
}

constexpr std::string_view kHead[] = {
    "",
    "samples",
    "count",
    "cpu",
    "wall",
    "nanoseconds",
    "trace_id",
    "span_id",
    "local_root_span_id",
    "span_type",
    "endpoint",
    "thread_name",
    "thread_state",
    "thread_id",
    "running",
    "gil_wait",
    "blocked",
    "link",
    "unknown",
    "await",
    "span_name",
    "task_name",
    "task_id",
    "trace_sampled",
    "false",
};

// The string table's fixed beginning and the three sample types.
std::string head() {
    std::string out;
    for (const std::string_view word : kHead) out += nested(6, std::string(word));
    out += nested(1, bytes({0x08, 1, 0x10, 2}));  // samples/count
    out += nested(1, bytes({0x08, 3, 0x10, 5}));  // cpu/nanoseconds
    out += nested(1, bytes({0x08, 4, 0x10, 5}));  // wall/nanoseconds
    return out;
}

// What follows the samples: period type, period, default sample type.
std::string tail(const std::string& times, const std::string& period) {
    return times + nested(11, bytes({0x08, 3, 0x10, 5})) + period + bytes({14 << 3, 3});
}

class Pprof : public testing::Test {
  protected:
    Pprof() : profile(Profile::create(0)) {}

    std::uint32_t string(const std::string& text) {
        return profile->string(text.data(), static_cast<std::uint32_t>(text.size()));
    }

    struct Texts {
        std::vector<Name> endpoints, threads, spans, tasks;
    };

    static Names list(const std::vector<Name>& names) { return {names.data(), names.size()}; }

    std::string encode(const Texts& texts = {}) {
        Buffer buffer;
        EXPECT_TRUE(encode_pprof(
            *profile,
            {list(texts.endpoints), list(texts.threads), list(texts.spans), list(texts.tasks)},
            &buffer));
        return {reinterpret_cast<const char*>(buffer.data()), buffer.size()};
    }

    std::unique_ptr<Profile, FreeProfile> profile;
};

TEST_F(Pprof, EmptyProfile) {
    profile->start_unix_ns = 1;
    profile->duration_ns = 300;
    profile->period_ns = 10'000'000;
    EXPECT_EQ(encode(), head() + tail(bytes({9 << 3, 1, 10 << 3, 0xac, 0x02}),
                                      bytes({12 << 3, 0x80, 0xad, 0xe2, 0x04})));
}

TEST_F(Pprof, OneSample) {
    const std::uint32_t inner = profile->function(string("inner"), string("a.py"), 7);
    const std::uint32_t outer = profile->function(string("outer"), string("a.py"), 3);
    const std::uint32_t stack[] = {profile->location(inner, 8), profile->location(outer, 300)};
    const std::uint32_t thread = profile->thread(1, 42);
    const std::uint32_t id =
        profile->sample(profile->stack(stack, 2), kNoEntry, thread, ThreadState::running);
    profile->samples[id].count = 2;
    profile->samples[id].cpu_ns = 5;
    profile->samples[id].wall_ns = 200;
    profile->threads[thread].cpu_sampled_ns = 5;
    profile->threads[thread].cpu_clock_ns = 10;

    // Entry 1 of the functions and locations is the stand-in for full tables: ids are entry + 1.
    std::string want = head();
    want += nested(6, "inner");  // 25
    want += nested(6, "a.py");   // 26
    want += nested(5, bytes({0x08, 2, 0x10, 25, 0x20, 26, 0x28, 7}));
    want += nested(4, bytes({0x08, 2, 0x22, 4, 0x08, 2, 0x10, 8}));
    want += nested(6, "outer");  // 27
    want += nested(5, bytes({0x08, 3, 0x10, 27, 0x20, 26, 0x28, 3}));
    want += nested(4, bytes({0x08, 3, 0x22, 5, 0x08, 3, 0x10, 0xac, 0x02}));
    want += nested(2, bytes({0x0a, 2, 2,    3,                // location ids
                             0x12, 4, 2,    10, 0xc8, 0x01,   // count, scaled CPU, wall
                             0x1a, 4, 0x08, 13, 0x18, 42,     // thread_id
                             0x1a, 4, 0x08, 12, 0x10, 14}));  // thread_state: running
    want += tail("", "");
    EXPECT_EQ(encode(), want);
}

TEST_F(Pprof, LinkedSampleWithEveryLabel) {
    const std::uint32_t place = profile->location(profile->function(string("f"), 0, 0), 0);
    LinkData link{};
    link.trace_id[0] = 0xab;
    link.trace_id[15] = 0x01;
    link.span_id[7] = 0xcd;
    link.local_root_span_id[6] = 0x01;
    link.span_type = span_type_intern("web", 3);
    link.name = 5;
    link.trace_flags = 1;
    const std::uint32_t thread = profile->thread(1, 9);
    const std::uint32_t id = profile->sample(profile->stack(&place, 1), profile->link(link), thread,
                                             ThreadState::gil_wait, 6);
    profile->samples[id].count = 1;

    std::string want = head();
    want += nested(6, "f");  // 25
    want += nested(5, bytes({0x08, 2, 0x10, 25}));
    want += nested(4, bytes({0x08, 2, 0x22, 2, 0x08, 2}));
    want += nested(6, "ab000000000000000000000000000001");  // 26
    want += nested(6, "00000000000000cd");                  // 27
    want += nested(6, "0000000000000100");                  // 28
    want += nested(6, "web");                               // 29
    want += nested(6, "/route");                            // 30
    want += nested(6, "GET");                               // 31
    want += nested(6, "worker");                            // 32
    want += nested(6, "Task-7");                            // 33
    std::string sample = bytes({0x0a, 1, 2, 0x12, 3, 1, 0, 0});
    const int labels[][2] = {{6, 26}, {7, 27}, {8, 28}, {9, 29}, {10, 30}, {20, 31}, {11, 32}};
    for (const auto& label : labels) {
        sample += nested(3, bytes({0x08, label[0], 0x10, label[1]}));
    }
    sample += nested(3, bytes({0x08, 13, 0x18, 9}));   // thread_id
    sample += nested(3, bytes({0x08, 12, 0x10, 15}));  // thread_state: gil_wait
    sample += nested(3, bytes({0x08, 21, 0x10, 33}));  // task_name
    sample += nested(3, bytes({0x08, 22, 0x18, 77}));  // task_id
    want += nested(2, sample);
    want += tail("", "");
    EXPECT_EQ(encode({{{1, "/other", 6, 0}, {0x100, "/route", 6, 0}, {0x200, "/third", 6, 0}},
                      {{8, "another", 7, 0}, {9, "worker", 6, 0}},
                      {{5, "GET", 3, 0}},
                      {{6, "Task-7", 6, 77}}}),
              want);
}

TEST_F(Pprof, ATraceThatIsNotSampledSaysSo) {
    const std::uint32_t place = profile->location(profile->function(string("f"), 0, 0), 0);
    const auto label = nested(3, bytes({0x08, 23, 0x10, 24}));
    for (const std::uint8_t flags : {0, 2, 1, 3}) {
        LinkData link{};
        link.span_id[7] = flags;
        link.trace_flags = flags;
        profile
            ->samples[profile->sample(profile->stack(&place, 1), profile->link(link),
                                      profile->thread(1, 1), ThreadState::running)]
            .count = 1;
    }
    const std::string out = encode();
    std::size_t found = 0;
    for (std::size_t at = out.find(label); at != std::string::npos; at = out.find(label, at + 1)) {
        ++found;
    }
    EXPECT_EQ(found, 2u);
}

TEST_F(Pprof, TasksThatWaitAreOnNoThread) {
    profile->awaits = true;
    const std::uint32_t place = profile->location(profile->function(string("f"), 0, 0), 0);
    const std::uint32_t id =
        profile->sample(profile->stack(&place, 1), kNoEntry, kNoEntry, ThreadState::blocked, 6);
    profile->samples[id].await_ns = 99;
    const std::string out = encode();
    EXPECT_NE(out.find(nested(1, bytes({0x08, 19, 0x10, 5}))), std::string::npos)
        << "await/nanoseconds";
    EXPECT_NE(out.find(nested(2, bytes({0x0a, 1, 2, 0x12, 4, 0, 0, 0, 99}))), std::string::npos);
}

TEST_F(Pprof, AThreadThatIsLeftOut) {
    const std::uint32_t thread = profile->thread(1, 9);
    const std::uint32_t id =
        profile->sample(profile->marker_stack("[x]"), kNoEntry, thread, ThreadState::running);
    profile->samples[id].count = 1;
    profile->threads[thread].left_out = true;
    EXPECT_EQ(encode(), head() + tail("", ""));
}

TEST_F(Pprof, UnknownLinkSaysSo) {
    const std::uint32_t stack = profile->marker_stack("[unreadable]");
    const std::uint32_t id =
        profile->sample(stack, kUnknownLink, profile->thread(1, 1), ThreadState::blocked);
    profile->samples[id].wall_ns = 1;
    const std::string label = bytes({0x1a, 4, 0x08, 17, 0x10, 18});
    EXPECT_NE(encode().find(label), std::string::npos);
}

TEST_F(Pprof, WhatNoSampleRefersToStaysInside) {
    string("secret");
    profile->function(string("unused"), string("unused.py"), 1);
    const std::uint32_t stack = profile->marker_stack("[never weighed]");
    profile->sample(stack, kNoEntry, profile->thread(1, 1), ThreadState::running);
    EXPECT_EQ(encode(), head() + tail("", ""));
}

TEST_F(Pprof, StringsAreWrittenOnce) {
    const std::uint32_t name = string("everywhere");
    for (std::int32_t line = 0; line < 50; ++line) {
        const std::uint32_t place = profile->location(profile->function(name, name, 1), line);
        const std::uint32_t id = profile->sample(profile->stack(&place, 1), kNoEntry,
                                                 profile->thread(1, 1), ThreadState::running);
        profile->samples[id].count = 1;
    }
    const std::string out = encode();
    const std::size_t at = out.find("everywhere");
    ASSERT_NE(at, std::string::npos);
    EXPECT_EQ(out.find("everywhere", at + 1), std::string::npos);
}

TEST(BufferTest, Varints) {
    Buffer buffer;
    buffer.varint(0);
    buffer.varint(127);
    buffer.varint(128);
    buffer.varint(~0ull);
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(buffer.data()), buffer.size()),
              bytes({0, 127, 0x80, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}));
}

TEST(BufferTest, GrowsAndClears) {
    Buffer buffer;
    const std::string text(100'000, 'x');
    for (int i = 0; i < 10; ++i) buffer.bytes(text.data(), text.size());
    EXPECT_EQ(buffer.size(), 1'000'000u);
    EXPECT_FALSE(buffer.failed());
    buffer.clear();
    EXPECT_EQ(buffer.size(), 0u);
    buffer.field(1, std::uint64_t{0});
    EXPECT_EQ(buffer.size(), 0u) << "zero is the default";
    buffer.field(1, "", 0);
    EXPECT_EQ(buffer.size(), 2u);
}

}  // namespace
}  // namespace otel_proflink::test
