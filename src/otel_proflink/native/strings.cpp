// SPDX-License-Identifier: Apache-2.0
#include "strings.hpp"

#include <algorithm>
#include <cstring>

namespace otel_proflink {
namespace {

char* put_utf8(char* out, std::uint32_t c) noexcept {
    if ((c >= 0xd800 && c <= 0xdfff) || c > 0x10ffff) c = 0xfffd;
    if (c < 0x80) {
        *out++ = static_cast<char>(c);
    } else if (c < 0x800) {
        *out++ = static_cast<char>(0xc0 | c >> 6);
        *out++ = static_cast<char>(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
        *out++ = static_cast<char>(0xe0 | c >> 12);
        *out++ = static_cast<char>(0x80 | (c >> 6 & 0x3f));
        *out++ = static_cast<char>(0x80 | (c & 0x3f));
    } else {
        *out++ = static_cast<char>(0xf0 | c >> 18);
        *out++ = static_cast<char>(0x80 | (c >> 12 & 0x3f));
        *out++ = static_cast<char>(0x80 | (c >> 6 & 0x3f));
        *out++ = static_cast<char>(0x80 | (c & 0x3f));
    }
    return out;
}

template <typename Unit>
void encode(const unsigned char* raw, std::uint32_t length, Utf8* out) noexcept {
    char* end = out->data;
    for (std::uint32_t i = 0; i < length; ++i) {
        Unit unit;
        std::memcpy(&unit, raw + i * sizeof(Unit), sizeof(Unit));
        end = put_utf8(end, unit);
    }
    out->size = static_cast<std::uint32_t>(end - out->data);
}

// Most names and paths are shorter, so that one read fetches both the header and the text.
constexpr std::uint32_t kGuess = 256;

// Reads the first `size` bytes of an object, and up to kGuess beyond them where they can be read:
// the object may end where its page does. How many were read; 0: none.
std::uint32_t read_ahead(Memory& memory, std::uintptr_t address, unsigned char* into,
                         std::uint32_t size) noexcept {
    constexpr std::uintptr_t kPage = 4096;  // at least; a larger one only means a shorter guess
    const auto left = static_cast<std::uint32_t>(kPage - address % kPage);
    const std::uint32_t most = std::max(size, std::min(left, kGuess));
    return memory.read(address, into, most) ? most : 0;
}

// Sequential bytes of a bytes object, a window at a time.
class Bytes {
  public:
    Bytes(Memory& memory, const ProflinkAbiObject& at, std::uintptr_t object) noexcept
        : memory_(memory), next_(object + at.bytes_data) {
        const std::uint32_t read =
            object == 0 ? 0 : read_ahead(memory, object, window_, at.bytes_data);
        if (read == 0) return;
        std::memcpy(&left_, window_ + at.bytes_size, sizeof(left_));
        at_ = at.bytes_data;
        filled_ = at_ + static_cast<std::uint32_t>(std::min<std::uint64_t>(left_, read - at_));
        next_ += filled_ - at_;
        left_ -= filled_ - at_;
    }

    bool get(std::uint8_t* byte) noexcept {
        if (at_ == filled_ && !refill()) return false;
        *byte = window_[at_++];
        return true;
    }

  private:
    bool refill() noexcept {
        filled_ = static_cast<std::uint32_t>(std::min<std::uint64_t>(left_, sizeof(window_)));
        at_ = 0;
        if (filled_ == 0 || !memory_.read(next_, window_, filled_)) return filled_ = 0, false;
        next_ += filled_;
        left_ -= filled_;
        return true;
    }

    Memory& memory_;
    std::uintptr_t next_;
    std::uint64_t left_ = 0;
    std::uint32_t at_ = 0;
    std::uint32_t filled_ = 0;
    std::uint8_t window_[512];
};

bool get_varint(Bytes& bytes, std::uint32_t* value) noexcept {
    std::uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 6) {
        std::uint8_t byte;
        if (!bytes.get(&byte)) return false;
        result |= static_cast<std::uint32_t>(byte & 63) << shift;
        if ((byte & 64) == 0) {
            *value = result;
            return true;
        }
    }
    return false;
}

bool get_signed(Bytes& bytes, std::int32_t* value) noexcept {
    std::uint32_t raw;
    if (!get_varint(bytes, &raw)) return false;
    const auto half = static_cast<std::int32_t>(raw >> 1);
    *value = (raw & 1) != 0 ? -half : half;
    return true;
}

bool skip(Bytes& bytes, int count, bool varints) noexcept {
    for (int i = 0; i < count; ++i) {
        std::uint8_t byte;
        std::uint32_t number;
        if (!(varints ? get_varint(bytes, &number) : bytes.get(&byte))) return false;
    }
    return true;
}

}  // namespace

bool read_string(Memory& memory, const ProflinkAbi& abi, std::uintptr_t object,
                 Utf8* out) noexcept {
    unsigned char raw[kMaxCharacters * 4];
    const std::uint32_t read =
        object == 0 ? 0 : read_ahead(memory, object, raw, abi.object.unicode_ascii_data);
    if (read == 0) return false;
    std::uint64_t length = 0;
    std::uint32_t state = 0;
    std::memcpy(&length, raw + abi.object.unicode_length, sizeof(length));
    std::memcpy(&state, raw + abi.object.unicode_state, sizeof(state));
    const std::uint32_t kind = state >> abi.object.unicode_kind_shift & 7;
    if ((state >> abi.object.unicode_compact_shift & 1) == 0) return false;
    if (kind != 1 && kind != 2 && kind != 4) return false;
    const bool ascii = (state >> abi.object.unicode_ascii_shift & 1) != 0;
    const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(length, kMaxCharacters));
    const std::uint32_t at =
        ascii ? abi.object.unicode_ascii_data : abi.object.unicode_compact_data;
    const unsigned char* text = raw + at;
    if (at + count * kind > read) {
        text = raw;
        if (!memory.read(object + at, raw, count * kind)) return false;
    }
    switch (kind) {
        case 1:
            encode<std::uint8_t>(text, count, out);
            break;
        case 2:
            encode<std::uint16_t>(text, count, out);
            break;
        default:
            encode<std::uint32_t>(text, count, out);
    }
    return true;
}

bool read_line(Memory& memory, const ProflinkAbi& abi, std::uintptr_t linetable,
               std::int32_t first_line, std::int32_t unit, std::int32_t* line) noexcept {
    if (unit < 0) {
        *line = first_line;
        return true;
    }
    Bytes bytes(memory, abi.object, linetable);
    std::int64_t computed = first_line;
    std::int64_t known = first_line;  // some code has no line: show the last one that had
    std::int32_t covered = 0;
    for (;;) {
        std::uint8_t head;
        if (!bytes.get(&head) || (head & 0x80) == 0) return false;
        const int code = head >> 3 & 15;
        std::int32_t delta = 0;
        bool ok = true;
        if (code == 15) {
            // no location
        } else if (code == 14) {
            ok = get_signed(bytes, &delta) && skip(bytes, 3, true);
        } else if (code == 13) {
            ok = get_signed(bytes, &delta);
        } else if (code >= 10) {
            delta = code - 10;
            ok = skip(bytes, 2, false);
        } else {
            ok = skip(bytes, 1, false);
        }
        if (!ok) return false;
        computed += delta;
        if (code != 15) known = computed;
        covered += (head & 7) + 1;
        if (unit < covered) {
            *line = static_cast<std::int32_t>(known);
            return known >= 0 && known <= 0x7fffffff;
        }
    }
}

}  // namespace otel_proflink
