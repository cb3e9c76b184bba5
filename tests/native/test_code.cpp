// SPDX-License-Identifier: Apache-2.0
//
// Code objects are told apart by what they are, not by where they lie.
#include <gtest/gtest.h>

#include <thread>

#include "code.hpp"
#include "support/static_thread.hpp"

namespace otel_proflink::test {
namespace {

struct FreeProfile {
    void operator()(Profile* profile) const { profile_free(profile); }
};

class Codes : public testing::Test {
  protected:
    Codes() : memory(1u << 17), abi(make_abi(Layout::py313)), table(new CodeTable(memory, abi)) {
        profile.reset(Profile::create(1));
        EXPECT_TRUE(table->begin(profile.get(), &dead_codes()));
        table->prepare();  // what earlier tests left behind
    }

    std::uint64_t* string(const std::string& text) {
        std::uint64_t* object = memory.allocate(8 + text.size() / 8);
        object[abi.object.unicode_length / 8] = text.size();
        const std::uint32_t state = 1u << abi.object.unicode_kind_shift |
                                    1u << abi.object.unicode_compact_shift |
                                    1u << abi.object.unicode_ascii_shift;
        std::memcpy(reinterpret_cast<char*>(object) + abi.object.unicode_state, &state, 4);
        std::memcpy(reinterpret_cast<char*>(object) + abi.object.unicode_ascii_data, text.data(),
                    text.size());
        return object;
    }

    std::uint64_t* lines() {
        std::uint64_t* object = memory.allocate(16);
        object[abi.object.bytes_size / 8] = 3 * 16;
        auto* data = reinterpret_cast<std::uint8_t*>(object) + abi.object.bytes_data;
        for (int i = 0; i < 16; ++i) {
            *data++ = 0x80 | 11 << 3 | 1;  // two units, one line on
            *data++ = 0;
            *data++ = 0;
        }
        return object;
    }

    std::uint64_t* code(const std::string& name, std::int32_t first_line = 10) {
        std::uint64_t* made = memory.allocate(code_at::size / 8 + 16);
        fill(made, name, first_line);
        return made;
    }

    // What is compiled into the memory of a code object that was freed.
    void fill(std::uint64_t* at, const std::string& name, std::int32_t first_line = 10) {
        std::memset(at, 0, code_at::size);
        put(at, kTypeAt, kCodeType);
        put(at, code_at::units, 32);
        put(at, code_at::first_line, static_cast<std::uint32_t>(first_line));
        put(at, code_at::filename, string(name + ".py"));
        put(at, code_at::qualname, string("module." + name));
        put(at, code_at::linetable, lines());
    }

    static Frame frame(const std::uint64_t* code, int unit = 0) {
        Frame made{};
        made.code = reinterpret_cast<std::uintptr_t>(code);
        made.instruction = made.code + code_at::size +
                           static_cast<std::uintptr_t>(static_cast<std::intptr_t>(2 * unit));
        return made;
    }

    bool visit(std::initializer_list<Frame> frames) {
        chain->count = 0;
        chain->omitted = 0;
        for (const Frame& each : frames) chain->frames[chain->count++] = each;
        table->prepare();
        return table->visit(*chain);
    }

    // "function:line" of each frame of the last visit, leaf first.
    std::vector<std::string> stack() {
        const Stack& ids = profile->stacks[table->intern_stack()];
        std::vector<std::string> out;
        for (std::uint32_t i = 0; i < ids.count; ++i) {
            const Location& location = profile->locations[profile->frames[ids.first + i]];
            const StringRef& name = profile->strings[profile->functions[location.function].name];
            out.push_back(std::string(&profile->text[name.offset], name.size) + ":" +
                          std::to_string(location.line));
        }
        return out;
    }
    using Stacks = std::vector<std::string>;

    static void die(const std::uint64_t* code) {
        dead_code_push(reinterpret_cast<std::uintptr_t>(code));
    }

    FlatMemory memory;
    ProflinkAbi abi;
    std::unique_ptr<CodeTable> table;
    std::unique_ptr<Profile, FreeProfile> profile;
    std::unique_ptr<Chain> chain = std::make_unique<Chain>();
};

TEST_F(Codes, NamesAndLines) {
    const auto* a = code("a");
    const auto* b = code("b", 50);
    ASSERT_TRUE(visit({frame(a, 0), frame(b, 3), frame(a, 31)}));
    table->frames_proven();
    EXPECT_EQ(stack(), (Stacks{"module.a:11", "module.b:52", "module.a:26"}));
}

TEST_F(Codes, KnownCodeIsNotReadAgain) {
    const auto* a = code("a");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    const std::uint64_t calls = memory.calls();
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(memory.calls(), calls);
    EXPECT_EQ(stack(), (Stacks{"module.a:11"}));
}

TEST_F(Codes, AddressOfAFreedCodeObject) {
    auto* a = code("a");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    die(a);
    fill(a, "b");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    EXPECT_EQ(stack(), (Stacks{"module.b:11"}));
}

// The strings' addresses are handed out again as well: only their content differs.
TEST_F(Codes, AddressesOfItsStringsToo) {
    auto* a = code("aaaa");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    die(a);
    auto* qualname = reinterpret_cast<std::uint64_t*>(a[code_at::qualname / 8]);
    const std::uint64_t* other = string("module.bbbb");
    std::memcpy(qualname, other, abi.object.unicode_ascii_data + 11);
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(stack(), (Stacks{"module.bbbb:11"}));
}

TEST_F(Codes, SameFunctionWithAnotherFirstLine) {
    auto* a = code("a", 10);
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    die(a);
    put(a, code_at::first_line, 90u);
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(stack(), (Stacks{"module.a:91"}));
}

TEST_F(Codes, WhatUnprovenFramesShowedIsForgotten) {
    auto* a = code("a");
    ASSERT_TRUE(visit({frame(a)}));
    table->rollback();
    fill(a, "b");  // nobody said that it died: it may not have been one when it was read
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(stack(), (Stacks{"module.b:11"}));
}

TEST_F(Codes, RollbackKeepsWhatWasProven) {
    const auto* a = code("a");
    auto* b = code("b");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    ASSERT_TRUE(visit({frame(a), frame(b)}));
    table->rollback();
    const std::uint64_t calls = memory.calls();
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(memory.calls(), calls);
}

TEST_F(Codes, DeathDuringTheAttempt) {
    const auto* a = code("a");
    const auto* b = code("b");
    chain->count = 1;
    chain->omitted = 0;
    chain->frames[0] = frame(a);
    table->prepare();
    die(b);
    EXPECT_TRUE(table->visit(*chain));
    table->prepare();
    die(a);
    EXPECT_FALSE(table->visit(*chain));
    table->rollback();
}

TEST_F(Codes, MoreDeathsThanTheRingHolds) {
    auto* a = code("a");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    die(a);
    for (std::uint32_t i = 0; i < DeadCodes::kCapacity + 10; ++i) dead_code_push(0x1000 + 16 * i);
    fill(a, "b");
    chain->count = 1;
    chain->frames[0] = frame(a);
    EXPECT_FALSE(table->visit(*chain)) << "some were lost during the attempt";
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(stack(), (Stacks{"module.b:11"}));
}

// Free-threaded from 3.14 on: each thread runs instructions of its own.
TEST_F(Codes, InstructionsInAThreadsCopy) {
    constexpr std::uint32_t kCopiesAt = code_at::size + 72;  // behind the main ones
    auto* a = code("a");
    std::uint64_t* second = memory.allocate(8);
    std::uint64_t* third = memory.allocate(8);
    std::uint64_t* copies = memory.allocate(3);
    put(copies, 0, 2);
    copies[1] = reinterpret_cast<std::uintptr_t>(a) + code_at::size;
    copies[2] = reinterpret_cast<std::uintptr_t>(second);
    put(a, kCopiesAt, copies);
    const auto in_copy = [&](const std::uint64_t* copy, std::int32_t number, int unit) {
        Frame made = frame(a);
        made.instruction = reinterpret_cast<std::uintptr_t>(copy) +
                           static_cast<std::uintptr_t>(static_cast<std::intptr_t>(2 * unit));
        made.copy = number;
        return made;
    };
    EXPECT_FALSE(visit({in_copy(second, 1, 3)})) << "an interpreter that has no copies";
    abi.code.copies = kCopiesAt;
    ASSERT_TRUE(visit({in_copy(second, 1, 3), frame(a, 31)}));
    EXPECT_EQ(stack(), (Stacks{"module.a:12", "module.a:26"}));
    EXPECT_FALSE(visit({in_copy(second, 1, 32)}));
    EXPECT_FALSE(visit({in_copy(second, 1, -1)}));
    EXPECT_FALSE(visit({in_copy(second, 0, 3)})) << "the frame runs the main ones";
    EXPECT_FALSE(visit({in_copy(second, 2, 3)})) << "there is no such copy";
    EXPECT_FALSE(visit({in_copy(third, 1, 3)})) << "not the copy that the frame runs";
    EXPECT_FALSE(visit({in_copy(second, -1, 3)}));
    // Freed, and made anew elsewhere.
    copies[2] = reinterpret_cast<std::uintptr_t>(third);
    ASSERT_TRUE(visit({in_copy(third, 1, 31)}));
    EXPECT_EQ(stack(), (Stacks{"module.a:26"}));
    put(a, kCopiesAt, std::uint64_t{0});
    EXPECT_FALSE(visit({in_copy(third, 1, 31)}));
}

TEST_F(Codes, InstructionsOutOfRange) {
    const auto* a = code("a");
    EXPECT_TRUE(visit({frame(a, 31)}));
    EXPECT_FALSE(visit({frame(a, 32)}));
    EXPECT_FALSE(visit({frame(a, -1)}));
    EXPECT_FALSE(visit({frame(a, -100000)}));
    Frame odd = frame(a);
    odd.instruction += 1;
    EXPECT_FALSE(visit({odd}));
    abi.code.first_instruction = -1;
    ASSERT_TRUE(visit({frame(a, -1)}));
    EXPECT_EQ(stack(), (Stacks{"module.a:10"}));
}

// 3.13+ pushes a frame of its own below an inlined constructor; `sys._getframe` never shows it.
TEST_F(Codes, WhatIsNotTraceableIsNotShown) {
    const auto* a = code("a");
    auto* shim = code("__init__");
    put(shim, code_at::first_traceable, 32u);
    const auto* b = code("b", 50);
    ASSERT_TRUE(visit({frame(a, 0), frame(shim, 3), frame(b, 3)}));
    table->frames_proven();
    EXPECT_EQ(stack(), (Stacks{"module.a:11", "module.b:52"}));
    ASSERT_TRUE(visit({frame(shim, 3), frame(b, 3)}));
    EXPECT_EQ(stack(), (Stacks{"module.b:52"}));
    put(shim, code_at::first_traceable, 31u);
    die(shim);
    ASSERT_TRUE(visit({frame(shim, 3), frame(b, 3)}));
    EXPECT_EQ(stack(), (Stacks{"module.__init__:12", "module.b:52"}));
}

TEST_F(Codes, WhatIsNotACodeObject) {
    auto* a = code("a");
    put(a, kTypeAt, kValueType);
    EXPECT_FALSE(visit({frame(a)}));
    put(a, kTypeAt, kCodeType);
    put(a, code_at::units, 0u);
    EXPECT_FALSE(visit({frame(a)}));
    put(a, code_at::units, 1u << 28);
    EXPECT_FALSE(visit({frame(a)}));
    put(a, code_at::units, 32u);
    put(a, code_at::qualname, 0x1230u);
    EXPECT_FALSE(visit({frame(a)}));
    EXPECT_FALSE(visit({frame(reinterpret_cast<std::uint64_t*>(0x1230))}));
    EXPECT_FALSE(visit({frame(nullptr)}));
}

TEST_F(Codes, OmittedFramesAreSaid) {
    const auto* a = code("a");
    chain->count = kMaxFrames;
    chain->omitted = 77;
    for (std::uint32_t i = 0; i < kMaxFrames; ++i) chain->frames[i] = frame(a);
    table->prepare();
    ASSERT_TRUE(table->visit(*chain));
    const Stacks names = stack();
    ASSERT_EQ(names.size(), kMaxFrames + 1);
    EXPECT_EQ(names[kMaxFrames / 2], "[77 frames omitted]:0");
    EXPECT_EQ(names[kMaxFrames / 2 - 1], "module.a:11");
    EXPECT_EQ(names[kMaxFrames], "module.a:11");
}

TEST_F(Codes, ANewProfileStartsAfresh) {
    const auto* a = code("a");
    ASSERT_TRUE(visit({frame(a)}));
    table->frames_proven();
    profile.reset(Profile::create(1));
    ASSERT_TRUE(table->begin(profile.get(), &dead_codes()));
    EXPECT_EQ(table->fill(), 0);
    ASSERT_TRUE(visit({frame(a)}));
    EXPECT_EQ(stack(), (Stacks{"module.a:11"}));
}

TEST(DeadCodesTest, ManyPushersLoseNothingUnsaid) {
    constexpr std::uint32_t kThreads = 4;
    constexpr std::uint32_t kEach = 20000;
    auto dead = std::make_unique<DeadCodes>();
    std::atomic<std::uint32_t> running{kThreads};
    std::vector<std::thread> threads;
    for (std::uint32_t t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            for (std::uint32_t i = 0; i < kEach; ++i) {
                dead->push((t * kEach + i + 1) * 16);
                if (i % 64 == 0) std::this_thread::yield();
            }
            --running;
        });
    }
    std::vector<std::uintptr_t> out(DeadCodes::kCapacity);
    std::vector<bool> seen(kThreads * kEach + 1);
    std::uint64_t drained = 0;
    std::uint64_t distrusts = 0;
    for (bool more = true; more;) {
        more = running.load() != 0;
        const std::uint32_t count = dead->drain(out.data(), DeadCodes::kCapacity);
        if (count == kNoEntry) {
            ++distrusts;
            continue;
        }
        drained += count;
        for (std::uint32_t i = 0; i < count; ++i) {
            ASSERT_EQ(out[i] % 16, 0u);
            ASSERT_LE(out[i] / 16, kThreads * kEach);
            seen[out[i] / 16] = true;
        }
    }
    for (std::thread& thread : threads) thread.join();
    if (distrusts == 0) {
        EXPECT_EQ(drained, kThreads * kEach);
    } else {
        EXPECT_LE(drained, kThreads * kEach);
    }
}

}  // namespace
}  // namespace otel_proflink::test
