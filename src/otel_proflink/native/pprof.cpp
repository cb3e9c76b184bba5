// SPDX-License-Identifier: Apache-2.0
#include "pprof.hpp"

#include <algorithm>
#include <cstdlib>

namespace otel_proflink {
namespace {

// Field numbers of github.com/google/pprof/proto/profile.proto.
enum ProfileField {
    kSampleType = 1,
    kSample = 2,
    kLocation = 4,
    kFunction = 5,
    kStringTable = 6,
    kTimeNanos = 9,
    kDurationNanos = 10,
    kPeriodType = 11,
    kPeriod = 12,
    kDefaultSampleType = 14
};
enum ValueTypeField { kType = 1, kUnit = 2 };
enum SampleField { kLocationId = 1, kValue = 2, kLabel = 3 };
enum LabelField { kKey = 1, kStr = 2, kNum = 3 };
enum LocationField { kLocationNumber = 1, kLine = 4 };
enum LineField { kFunctionId = 1, kLineNumber = 2 };
enum FunctionField { kFunctionNumber = 1, kName = 2, kFilename = 4, kStartLine = 5 };

// The fixed head of the string table; entry 0 must be "".
enum Word : std::uint32_t {
    kEmpty,
    kSamples,
    kCount,
    kCpu,
    kWall,
    kNanoseconds,
    kTraceId,
    kSpanId,
    kLocalRootSpanId,
    kSpanType,
    kEndpoint,
    kThreadName,
    kThreadState,
    kThreadId,
    kRunning,
    kGilWait,
    kBlocked,
    kLink,
    kUnknown,
    kAwait,
    kSpanName,
    kTaskName,
    kTaskId,
    kTraceSampled,
    kFalse,
    kWords
};
constexpr const char* kWordTexts[kWords] = {"",
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
                                            "false"};

template <typename T>
class Zeroed {
  public:
    explicit Zeroed(std::size_t count) noexcept
        : data_(static_cast<T*>(std::calloc(count == 0 ? 1 : count, sizeof(T)))) {}
    Zeroed(const Zeroed&) = delete;
    Zeroed& operator=(const Zeroed&) = delete;
    ~Zeroed() { std::free(data_); }
    bool ok() const noexcept { return data_ != nullptr; }
    T& operator[](std::size_t i) noexcept { return data_[i]; }

  private:
    T* data_;
};

void put_hex(const std::uint8_t* bytes, std::uint32_t count, char* out) noexcept {
    constexpr char digits[] = "0123456789abcdef";
    for (std::uint32_t i = 0; i < count; ++i) {
        out[2 * i] = digits[bytes[i] >> 4];
        out[2 * i + 1] = digits[bytes[i] & 15];
    }
}

std::uint64_t big_endian(const std::uint8_t* bytes) noexcept {
    std::uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | bytes[i];
    return value;
}

// Names by number, each written as a string when a sample first shows it.
class NameTable {
  public:
    explicit NameTable(const Names& names) noexcept : names_(names), strings_(names.count) {}
    bool ok() const noexcept { return strings_.ok(); }

    // nullptr: not known.
    const Name* find(std::uint64_t id, std::uint32_t** string) noexcept {
        const Name* end = names_.items + names_.count;
        const Name* found = std::lower_bound(
            names_.items, end, id,
            [](const Name& name, std::uint64_t wanted) { return name.id < wanted; });
        if (found == end || found->id != id) return nullptr;
        *string = &strings_[static_cast<std::size_t>(found - names_.items)];
        return found;
    }

  private:
    Names names_;
    Zeroed<std::uint32_t> strings_;
};

// Strings, functions and locations are written when a sample first refers to them, so nothing
// that was interned but never proven leaves the process.
class Encoder {
  public:
    Encoder(const Profile& profile, const Vocabulary& vocabulary, Buffer* out) noexcept
        : profile_(profile),
          endpoints_(vocabulary.endpoints),
          thread_names_(vocabulary.threads),
          span_names_(vocabulary.spans),
          task_names_(vocabulary.tasks),
          out_(*out),
          strings_(profile.strings.size()),
          functions_(profile.functions.size()),
          locations_(profile.locations.size()),
          links_(profile.links.size()),
          types_(256) {}

    bool run() noexcept {
        if (!strings_.ok() || !functions_.ok() || !locations_.ok() || !links_.ok() ||
            !types_.ok() || !endpoints_.ok() || !thread_names_.ok() || !span_names_.ok() ||
            !task_names_.ok()) {
            return false;
        }
        for (const char* word : kWordTexts) add_string(word, std::strlen(word));
        value_type(kSampleType, kSamples, kCount);
        value_type(kSampleType, kCpu, kNanoseconds);
        value_type(kSampleType, kWall, kNanoseconds);
        if (profile_.awaits) value_type(kSampleType, kAwait, kNanoseconds);
        for (std::uint32_t i = 0; i < profile_.samples.size(); ++i) sample(profile_.samples[i]);
        out_.field(kTimeNanos, profile_.start_unix_ns);
        out_.field(kDurationNanos, profile_.duration_ns);
        value_type(kPeriodType, kCpu, kNanoseconds);
        out_.field(kPeriod, profile_.period_ns);
        out_.field(kDefaultSampleType, kCpu);
        return !out_.failed() && !failed_;
    }

  private:
    std::uint32_t add_string(const char* text, std::size_t size) noexcept {
        out_.field(kStringTable, text, size);
        return string_count_++;
    }

    std::uint32_t string(std::uint32_t id) noexcept {
        if (strings_[id] == 0 && profile_.strings[id].size != 0) {
            const StringRef& ref = profile_.strings[id];
            strings_[id] = add_string(&profile_.text[ref.offset], ref.size);
        }
        return strings_[id];
    }

    void value_type(std::uint32_t number, Word type, Word unit) noexcept {
        inner_.clear();
        inner_.field(kType, type);
        inner_.field(kUnit, unit);
        out_.field(number, inner_);
    }

    // Ids are table numbers + 1: 0 is not a valid id.
    std::uint64_t function(std::uint32_t id) noexcept {
        if (!functions_[id]) {
            functions_[id] = true;
            const Function& f = profile_.functions[id];
            const std::uint32_t name = string(f.name);
            const std::uint32_t file = string(f.file);
            inner_.clear();
            inner_.field(kFunctionNumber, id + 1u);
            inner_.field(kName, name);
            // No system name: where it equals the name, Go's pprof takes it for a mangled C++ one
            // and cuts what is in angle brackets, as in `<module>` and `f.<locals>.g`.
            inner_.field(kFilename, file);
            inner_.field(kStartLine, static_cast<std::uint64_t>(f.first_line));
            out_.field(kFunction, inner_);
        }
        return id + 1u;
    }

    std::uint64_t location(std::uint32_t id) noexcept {
        if (!locations_[id]) {
            locations_[id] = true;
            const Location& l = profile_.locations[id];
            const std::uint64_t function_id = function(l.function);
            line_.clear();
            line_.field(kFunctionId, function_id);
            line_.field(kLineNumber, static_cast<std::uint64_t>(l.line));
            inner_.clear();
            inner_.field(kLocationNumber, id + 1u);
            inner_.field(kLine, line_);
            out_.field(kLocation, inner_);
        }
        return id + 1u;
    }

    void label(Word key, std::uint32_t text) noexcept {
        if (text == 0) return;
        inner_.clear();
        inner_.field(kKey, key);
        inner_.field(kStr, text);
        sample_.field(kLabel, inner_);
    }

    void number_label(Word key, std::uint64_t number) noexcept {
        inner_.clear();
        inner_.field(kKey, key);
        inner_.field(kNum, number);
        sample_.field(kLabel, inner_);
    }

    const Name* name_label(Word key, NameTable& names, std::uint64_t id) noexcept {
        std::uint32_t* text = nullptr;
        const Name* found = names.find(id, &text);
        if (found == nullptr) return nullptr;
        if (*text == 0 && found->size != 0) *text = add_string(found->text, found->size);
        label(key, *text);
        return found;
    }

    struct LinkStrings {
        std::uint32_t trace_id, span_id, local_root;
    };

    void link_labels(std::uint32_t id) noexcept {
        const LinkData& link = profile_.links[id];
        LinkStrings& texts = links_[id];
        if (texts.trace_id == 0) {
            char hex[32];
            put_hex(link.trace_id, 16, hex);
            texts.trace_id = add_string(hex, 32);
            put_hex(link.span_id, 8, hex);
            texts.span_id = add_string(hex, 16);
            put_hex(link.local_root_span_id, 8, hex);
            texts.local_root = add_string(hex, 16);
        }
        label(kTraceId, texts.trace_id);
        label(kSpanId, texts.span_id);
        label(kLocalRootSpanId, texts.local_root);
        if (link.span_type != 0) {
            if (types_[link.span_type] == 0) {
                const char* text = span_type_text(link.span_type);
                types_[link.span_type] = add_string(text, std::strlen(text));
            }
            label(kSpanType, types_[link.span_type]);
        }
        // Nothing that is looked up by this trace id will be found.
        if ((link.trace_flags & kTraceFlagSampled) == 0) label(kTraceSampled, kFalse);
        name_label(kEndpoint, endpoints_, big_endian(link.local_root_span_id));
        if (link.name != 0) name_label(kSpanName, span_names_, link.name);
    }

    void thread_labels(const Sample& sample) noexcept {
        const ProfiledThread& thread = profile_.threads[sample.thread];
        name_label(kThreadName, thread_names_, static_cast<std::uint64_t>(thread.tid));
        number_label(kThreadId, static_cast<std::uint64_t>(thread.tid));
        constexpr Word states[] = {kRunning, kGilWait, kBlocked};
        label(kThreadState, states[static_cast<int>(sample.state)]);
    }

    void task_labels(std::uint64_t task) noexcept {
        if (const Name* found = name_label(kTaskName, task_names_, task)) {
            number_label(kTaskId, found->number);
        }
    }

    // A thread's on-CPU samples share what its CPU clock says it burnt.
    std::uint64_t scaled_cpu(const Sample& sample) const noexcept {
        if (sample.cpu_ns == 0) return 0;
        const ProfiledThread& thread = profile_.threads[sample.thread];
        if (thread.cpu_sampled_ns == 0) return 0;
        return static_cast<std::uint64_t>(static_cast<long double>(sample.cpu_ns) *
                                              static_cast<long double>(thread.cpu_clock_ns) /
                                              static_cast<long double>(thread.cpu_sampled_ns) +
                                          0.5L);
    }

    void sample(const Sample& sample) noexcept {
        if (sample.count == 0 && sample.wall_ns == 0 && sample.await_ns == 0) return;
        if (sample.thread != kNoEntry && profile_.threads[sample.thread].left_out) return;
        const Stack& stack = profile_.stacks[sample.stack];
        packed_.clear();
        for (std::uint32_t i = 0; i < stack.count; ++i) {
            packed_.varint(location(profile_.frames[stack.first + i]));
        }
        sample_.clear();
        sample_.field(kLocationId, packed_);
        packed_.clear();
        packed_.varint(sample.count);
        packed_.varint(scaled_cpu(sample));
        packed_.varint(sample.wall_ns);
        if (profile_.awaits) packed_.varint(sample.await_ns);
        sample_.field(kValue, packed_);
        if (sample.link == kUnknownLink) {
            label(kLink, kUnknown);
        } else if (sample.link != kNoEntry) {
            link_labels(sample.link);
        }
        if (sample.thread != kNoEntry) thread_labels(sample);
        if (sample.task != 0) task_labels(sample.task);
        if (sample_.failed() || packed_.failed() || inner_.failed()) failed_ = true;
        out_.field(kSample, sample_);
    }

    const Profile& profile_;
    NameTable endpoints_, thread_names_, span_names_, task_names_;
    Buffer& out_;
    Buffer inner_, line_, sample_, packed_;
    bool failed_ = false;
    std::uint32_t string_count_ = 0;
    Zeroed<std::uint32_t> strings_;
    Zeroed<bool> functions_;
    Zeroed<bool> locations_;
    Zeroed<LinkStrings> links_;
    Zeroed<std::uint32_t> types_;
};

}  // namespace

bool encode_pprof(const Profile& profile, const Vocabulary& vocabulary, Buffer* out) noexcept {
    Encoder encoder(profile, vocabulary, out);
    return encoder.run();
}

}  // namespace otel_proflink
