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
                                            "unknown"};

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

// Strings, functions and locations are written when a sample first refers to them, so nothing
// that was interned but never proven leaves the process.
class Encoder {
  public:
    Encoder(const Profile& profile, const Endpoint* endpoints, std::size_t endpoint_count,
            const ThreadName* names, std::size_t name_count, Buffer* out) noexcept
        : profile_(profile),
          endpoints_(endpoints),
          endpoint_count_(endpoint_count),
          names_(names),
          name_count_(name_count),
          out_(*out),
          strings_(profile.strings.size()),
          functions_(profile.functions.size()),
          locations_(profile.locations.size()),
          links_(profile.links.size()),
          types_(256),
          thread_names_(profile.threads.size()),
          endpoint_strings_(endpoint_count) {}

    bool run() noexcept {
        if (!strings_.ok() || !functions_.ok() || !locations_.ok() || !links_.ok() ||
            !types_.ok() || !thread_names_.ok() || !endpoint_strings_.ok()) {
            return false;
        }
        for (const char* word : kWordTexts) add_string(word, std::strlen(word));
        value_type(kSampleType, kSamples, kCount);
        value_type(kSampleType, kCpu, kNanoseconds);
        value_type(kSampleType, kWall, kNanoseconds);
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
        const std::uint64_t root = big_endian(link.local_root_span_id);
        const Endpoint* end = endpoints_ + endpoint_count_;
        const Endpoint* found = std::lower_bound(
            endpoints_, end, root,
            [](const Endpoint& e, std::uint64_t id_) { return e.local_root_span_id < id_; });
        if (found != end && found->local_root_span_id == root) {
            std::uint32_t& text = endpoint_strings_[static_cast<std::size_t>(found - endpoints_)];
            if (text == 0) text = add_string(found->text, found->size);
            label(kEndpoint, text);
        }
    }

    void thread_labels(std::uint32_t id) noexcept {
        const ProfiledThread& thread = profile_.threads[id];
        const ThreadName* end = names_ + name_count_;
        const ThreadName* found =
            std::lower_bound(names_, end, thread.tid,
                             [](const ThreadName& n, std::int64_t tid) { return n.tid < tid; });
        if (found != end && found->tid == thread.tid) {
            if (thread_names_[id] == 0) thread_names_[id] = add_string(found->text, found->size);
            label(kThreadName, thread_names_[id]);
        }
        inner_.clear();
        inner_.field(kKey, kThreadId);
        inner_.field(kNum, static_cast<std::uint64_t>(thread.tid));
        sample_.field(kLabel, inner_);
    }

    // A thread's on-CPU samples share what its CPU clock says it burnt.
    std::uint64_t scaled_cpu(const Sample& sample) const noexcept {
        const ProfiledThread& thread = profile_.threads[sample.thread];
        if (thread.cpu_sampled_ns == 0) return 0;
        return static_cast<std::uint64_t>(static_cast<long double>(sample.cpu_ns) *
                                              static_cast<long double>(thread.cpu_clock_ns) /
                                              static_cast<long double>(thread.cpu_sampled_ns) +
                                          0.5L);
    }

    void sample(const Sample& sample) noexcept {
        if (sample.count == 0 && sample.wall_ns == 0) return;
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
        sample_.field(kValue, packed_);
        if (sample.link == kUnknownLink) {
            label(kLink, kUnknown);
        } else if (sample.link != kNoEntry) {
            link_labels(sample.link);
        }
        thread_labels(sample.thread);
        constexpr Word states[] = {kRunning, kGilWait, kBlocked};
        label(kThreadState, states[static_cast<int>(sample.state)]);
        if (sample_.failed() || packed_.failed() || inner_.failed()) failed_ = true;
        out_.field(kSample, sample_);
    }

    const Profile& profile_;
    const Endpoint* endpoints_;
    std::size_t endpoint_count_;
    const ThreadName* names_;
    std::size_t name_count_;
    Buffer& out_;
    Buffer inner_, line_, sample_, packed_;
    bool failed_ = false;
    std::uint32_t string_count_ = 0;
    Zeroed<std::uint32_t> strings_;
    Zeroed<bool> functions_;
    Zeroed<bool> locations_;
    Zeroed<LinkStrings> links_;
    Zeroed<std::uint32_t> types_;
    Zeroed<std::uint32_t> thread_names_;
    Zeroed<std::uint32_t> endpoint_strings_;
};

}  // namespace

bool encode_pprof(const Profile& profile, const Endpoint* endpoints, std::size_t endpoint_count,
                  const ThreadName* names, std::size_t name_count, Buffer* out) noexcept {
    Encoder encoder(profile, endpoints, endpoint_count, names, name_count, out);
    return encoder.run();
}

}  // namespace otel_proflink
