// SPDX-License-Identifier: Apache-2.0
#include "context.hpp"

#include <cstring>

namespace otel_proflink {
namespace {

// CPython: 32 bits of hash, 5 a level, and one more level for collisions.
constexpr int kMaxDepth = 8;
// A collision node holds keys with equal 32-bit hashes: more than a few is garbage.
constexpr std::uint64_t kMaxCollisions = 64;

struct Pair {
    std::uintptr_t key;
    std::uintptr_t value;
};

enum class Find : std::uint8_t { found, absent, failed };

// The head of a node. Most contexts hold a few variables, so the first pairs are read with it.
struct Node {
    static constexpr std::uint32_t kPairs = 3;
    unsigned char raw[32 + kPairs * sizeof(Pair)];
    std::uint32_t size = 0;
};

template <typename T>
T load(const unsigned char* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

bool read_node(Memory& memory, const ProflinkAbi& abi, std::uintptr_t address,
               Node* node) noexcept {
    node->size = sizeof(node->raw);
    if (memory.read(address, node->raw, node->size)) return true;
    // The object may end where its page does.
    node->size = abi.context.bitmap_pairs;
    return memory.read(address, node->raw, node->size);
}

Find find_in_bitmap(Memory& memory, const ProflinkAbi& abi, std::uintptr_t address,
                    const Node& node, std::uint32_t shift, std::uint32_t hash, Pair* pair,
                    std::uintptr_t* pair_at) noexcept {
    const auto bits = load<std::uint32_t>(node.raw + abi.context.bitmap_bits);
    const std::uint32_t bit = 1u << ((hash >> shift) & 31u);
    if ((bits & bit) == 0) return Find::absent;
    const auto index = static_cast<std::uint32_t>(__builtin_popcount(bits & (bit - 1)));
    const auto at = static_cast<std::uint32_t>(abi.context.bitmap_pairs + index * sizeof(Pair));
    *pair_at = address + at;
    if (at + sizeof(Pair) <= node.size) {
        *pair = load<Pair>(node.raw + at);
        return Find::found;
    }
    return memory.read(address + at, pair, sizeof(Pair)) ? Find::found : Find::failed;
}

Find find_in_collision(Memory& memory, const ProflinkAbi& abi, std::uintptr_t node,
                       std::uintptr_t variable, PairSource* source) noexcept {
    std::uint64_t size = 0;
    if (!memory.read(node + abi.context.collision_size, &size, sizeof(size))) return Find::failed;
    if (size % 2 != 0 || size > 2 * kMaxCollisions) return Find::failed;
    for (std::uint64_t i = 0; i < size / 2; ++i) {
        Pair pair{};
        const std::uintptr_t at = node + abi.context.collision_pairs + i * sizeof(Pair);
        if (!memory.read(at, &pair, sizeof(pair))) return Find::failed;
        if (pair.key == variable) {
            *source = {at, {pair.key, pair.value}};
            return Find::found;
        }
    }
    return Find::absent;
}

// The value under `key` in the HAMT whose root node is `node`.
Find find(Memory& memory, const ProflinkAbi& abi, const VariableKey& key, std::uintptr_t node,
          PairSource* source) noexcept {
    std::uint32_t shift = 0;
    for (int depth = 0; depth < kMaxDepth; ++depth, shift += 5) {
        Node head;
        if (!read_node(memory, abi, node, &head)) return Find::failed;
        const auto type = load<std::uintptr_t>(head.raw + abi.object.object_type);
        if (type == abi.array_type) {
            if (shift > 30) return Find::failed;
            const std::uint32_t index = (key.folded_hash >> shift) & 31u;
            std::uintptr_t child = 0;
            if (!memory.read(node + abi.context.array_children + index * sizeof(child), &child,
                             sizeof(child))) {
                return Find::failed;
            }
            if (child == 0) return Find::absent;
            node = child;
        } else if (type == abi.bitmap_type) {
            if (shift > 30) return Find::failed;
            Pair pair{};
            std::uintptr_t at = 0;
            const Find found =
                find_in_bitmap(memory, abi, node, head, shift, key.folded_hash, &pair, &at);
            if (found != Find::found) return found;
            if (pair.key != 0) {
                if (pair.key != key.variable) return Find::absent;
                *source = {at, {pair.key, pair.value}};
                return Find::found;
            }
            node = pair.value;
        } else {
            return find_in_collision(memory, abi, node, key.variable, source);
        }
        if (node == 0) return Find::failed;
    }
    return Find::failed;
}

bool root_of(Memory& memory, const ProflinkAbi& abi, std::uintptr_t variables,
             std::uintptr_t* root) noexcept {
    return variables != 0 && memory.read(variables + abi.context.hamt_root, root, sizeof(*root)) &&
           *root != 0;
}

// Of a label that is proven or not as a whole. Without a task is an ordinary case.
void read_task(Memory& memory, const ProflinkAbi& abi, const ContextKey& key, std::uintptr_t root,
               LabelSource* source, Label* label) noexcept {
    switch (find(memory, abi, key.task, root, &source->task)) {
        case Find::failed:
            label->state = LabelState::unknown;
            return;
        case Find::absent:
            return;
        case Find::found:
            break;
    }
    const std::uintptr_t value = source->task.pair[1];
    std::uintptr_t type = 0;
    const ReadRequest requests[] = {
        {value + abi.object.object_type, &type, sizeof(type)},
        {value + key.task_offset, &label->task, sizeof(label->task)},
    };
    if (!memory.read(requests, 2) || type != key.task.value_type) {
        label->task = 0;
        label->state = LabelState::unknown;
    }
}

}  // namespace

Label read_label(Memory& memory, const ProflinkAbi& abi, const ContextKey& key,
                 std::uintptr_t context, std::uintptr_t variables, LabelSource* source) noexcept {
    Label label;
    if (context == 0) {
        label.state = LabelState::none;
        return label;
    }
    std::uintptr_t root = 0;
    if (!root_of(memory, abi, variables, &root)) return label;
    switch (find(memory, abi, key, root, source)) {
        case Find::failed:
            return label;
        case Find::absent:
            label.state = LabelState::none;
            return label;
        case Find::found:
            break;
    }
    const std::uintptr_t value = source->pair[1];
    std::uintptr_t type = 0;
    std::uintptr_t record = 0;
    std::uint64_t serial = 0;
    const ReadRequest requests[] = {
        {value + abi.object.object_type, &type, sizeof(type)},
        {value + key.record_offset, &record, sizeof(record)},
        {value + key.serial_offset, &serial, sizeof(serial)},
    };
    if (!memory.read(requests, 3) || type != key.value_type) return label;
    if (record == 0) {
        label.state = LabelState::none;
    } else if (link_read(record, serial, &label.link)) {
        label.state = LabelState::linked;
        label.serial = serial;
    }
    if (label.state != LabelState::unknown && __atomic_load_n(&key.tasks, __ATOMIC_ACQUIRE)) {
        read_task(memory, abi, key, root, source, &label);
    }
    return label;
}

std::uintptr_t hamt_root_type(Memory& memory, const ProflinkAbi& abi,
                              std::uintptr_t context) noexcept {
    std::uintptr_t variables = 0;
    std::uintptr_t root = 0;
    std::uintptr_t type = 0;
    if (!memory.read(context + abi.context.context_vars, &variables, sizeof(variables)) ||
        !root_of(memory, abi, variables, &root)) {
        return 0;
    }
    if (!memory.read(root + abi.object.object_type, &type, sizeof(type))) return 0;
    return type;
}

}  // namespace otel_proflink
