// SPDX-License-Identifier: Apache-2.0
#include "support/interpreter_model.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace otel_proflink::test {
namespace {

constexpr std::size_t kArenaWords = 1u << 17;
// Small, so that stacks a few frames deep grow into a second and third chunk.
constexpr std::uint32_t kChunkWords = 40;
// A C stack level holds a _PyCFrame and an entry shim.
constexpr std::uint32_t kLevelWords = 8;
constexpr std::uint32_t kShimWord = 4;
constexpr std::uint32_t kLevels = 24;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "interpreter model: %s\n", what);
    std::abort();
}

std::uint64_t mix64(std::uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

bool is_prime(std::size_t n) {
    for (std::size_t i = 2; i * i <= n; ++i) {
        if (n % i == 0) return false;
    }
    return n > 1;
}

}  // namespace

bool Truth::contains(std::uint32_t function) const {
    return std::find(chain.begin(), chain.end(), function) != chain.end();
}

bool Truth::calls(std::uint32_t callee, std::uint32_t caller) const {
    for (std::size_t i = 0; i + 1 < chain.size(); ++i) {
        if (chain[i] == callee && chain[i + 1] == caller) return true;
    }
    return false;
}

std::uint64_t truth_hash(int link, const std::uint32_t* chain, std::size_t count) {
    std::uint64_t hash = mix64(static_cast<std::uint64_t>(link + 2));
    for (std::size_t i = 0; i < count; ++i) hash = mix64(hash ^ (chain[i] + 1));
    return hash;
}

Model::Model(Layout layout, Options options) : layout_(layout), options_(options) {
    arena_.resize(kArenaWords);
    bump_ = 64;  // reads may begin a little before an object
    truths_.push_back(Truth{});
    function();  // number 0: the trampoline that entry shims run
    add_thread(0, 7001);
    add_thread(1, 7002);
    slots_[0].tid.store(7001);
    slots_[1].tid.store(7002);
    frozen_slot_.tid.store(7001);
}

Model::~Model() {
    for (LinkRecord* record : records_) {
        if (record != nullptr) link_free(record);
    }
}

// --- Memory

std::uint64_t* Model::allocate(std::uint32_t words) {
    words = (words + 1) / 2 * 2;  // 16-byte classes, as pymalloc
    auto& list = free_[words];
    std::uint64_t* block;
    if (!list.empty()) {
        block = list.back();
        list.pop_back();
    } else {
        if (bump_ + words + 64 > arena_.size()) fail("out of memory");
        block = arena_.data() + bump_;
        bump_ += words;
    }
    sizes_[block] = words;
    return block;
}

void Model::release(std::uint64_t* block) {
    const auto found = sizes_.find(block);
    if (found == sizes_.end()) fail("double free");
    free_[found->second].push_back(block);
    sizes_.erase(found);
}

bool Model::holds(std::uintptr_t address, std::size_t size) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(arena_.data());
    const std::uintptr_t end = begin + arena_.size() * sizeof(std::uint64_t);
    return address >= begin && address <= end && size <= end - address;
}

void Model::emit(Kind kind, std::uint64_t* at, std::uint64_t value, const char* what) {
    const Op op{kind, at, value, truth_, also_true_, what};
    if (looping_) {
        ops_.push_back(op);
    } else {
        execute(op);
    }
}

void Model::store(std::uint64_t* base, std::uint32_t offset, std::uint64_t value,
                  const char* what) {
    emit(Kind::store, base + offset / 8, value, what);
}

void Model::nop() { emit(Kind::nop, nullptr, 0, "nop"); }

std::uint32_t Model::intern_truth(std::size_t visible) {
    const Thread& t = *threads_[0];
    Truth truth;
    truth.alive = t.alive;
    if (t.alive) {
        for (std::size_t i = visible; i-- > 0;) {
            truth.chain.push_back(t.frames[i].function->number);
        }
        const Context* context = t.contexts.empty() ? nullptr : t.contexts.back();
        if (context != nullptr && context->vars->ours != nullptr) {
            truth.link = context->vars->ours->link;
        }
    }
    truth.hash = truth_hash(truth.link, truth.chain.data(), truth.chain.size()) + (t.alive ? 0 : 1);
    const auto [at, fresh] =
        truth_index_.try_emplace(truth.hash, static_cast<std::uint32_t>(truths_.size()));
    if (fresh) truths_.push_back(std::move(truth));
    return at->second;
}

// Says what is true after the next store.
void Model::truth_changed() { truth_ = also_true_ = intern_truth(threads_[0]->visible); }

// --- Running

void Model::execute(const Op& op) {
    switch (op.kind) {
        case Kind::nop:
            break;
        case Kind::store:
            *op.at = op.value;
            break;
        case Kind::add_one:
            ++*op.at;
            break;
        case Kind::new_id:
            *op.at = next_id_++;
            break;
        case Kind::slot_begin:
            if (!options_.slots_never_move) attach_begin(&slots_[op.value]);
            break;
        case Kind::slot_done:
            if (!options_.slots_never_move) attach_done(&slots_[op.value]);
            break;
        case Kind::code_death:
            deaths_.push_back(reinterpret_cast<std::uintptr_t>(op.at));
            break;
        case Kind::link_make: {
            std::uint8_t trace[16] = {1};
            std::uint8_t span[8] = {2};
            std::uint8_t root[8] = {3};
            const auto number = static_cast<std::uint32_t>(op.value);
            std::memcpy(trace + 4, &number, 4);
            std::memcpy(span + 4, &number, 4);
            std::memcpy(root + 4, &number, 4);
            records_[op.value] = link_new(trace, span, root, 1, 0, 0);
            if (records_[op.value] == nullptr) fail("no link record");
            break;
        }
        case Kind::link_drop:
            link_free(records_[op.value]);
            records_[op.value] = nullptr;
            break;
        case Kind::store_record:
            *op.at = reinterpret_cast<std::uint64_t>(records_[op.value]);
            break;
        case Kind::store_serial:
            *op.at = records_[op.value]->serial.load(std::memory_order_relaxed);
            break;
    }
}

void Model::advance(std::uint32_t steps) {
    for (std::uint32_t i = 0; i < steps; ++i) {
        execute(ops_[position_]);
        if (++position_ == ops_.size()) position_ = 0;
    }
}

void Model::rewind_to(std::uint32_t position) {
    while (position_ != position) advance(1);
}

ThreadKey Model::key() const {
    const Thread& t = *threads_[0];
    return {reinterpret_cast<std::uintptr_t>(t.tstate), t.tstate[tstate_at::id / 8], t.tid,
            &slots_[0], 0};
}

std::uint64_t Model::serial_of(int link) const {
    const LinkRecord* record = records_[static_cast<std::size_t>(link)];
    return record == nullptr ? 0 : record->serial.load(std::memory_order_relaxed);
}

std::uint32_t Model::link_number(const LinkData& link) {
    std::uint32_t in_trace, in_span, in_root;
    std::memcpy(&in_trace, link.trace_id + 4, 4);
    std::memcpy(&in_span, link.span_id + 4, 4);
    std::memcpy(&in_root, link.local_root_span_id + 4, 4);
    const bool whole = in_trace == in_span && in_span == in_root && link.trace_id[0] == 1;
    return whole ? in_span : 0xffffffffu;
}

void Model::begin_loop() {
    truth_changed();
    looping_ = true;
    live_at_loop_ = sizes_;
}

void Model::end_loop() {
    // The addresses are fixed: the next round must find the same objects in the same places.
    if (sizes_ != live_at_loop_) fail("the loop does not end as it began");
    while (!is_prime(ops_.size())) nop();
    looping_ = false;
    truth_before_.resize(ops_.size());
    for (std::size_t i = 0; i < ops_.size(); ++i) {
        const Op& before = ops_[(i + ops_.size() - 1) % ops_.size()];
        truth_before_[i] = {before.truth, before.also_true};
    }
}

// --- Threads

void Model::add_thread(int slot, std::int32_t tid) {
    threads_.push_back(std::make_unique<Thread>());
    Thread* t = threads_.back().get();
    t->tstate = allocate(tstate_at::size / 8 + 2);
    t->c_stack = allocate(kLevels * kLevelWords);
    t->slot = slot;
    t->tid = tid;
    init_tstate(t);
}

void Model::init_tstate(Thread* t) {
    t->c_depth = 1;  // level 0: root _PyCFrame
    t->cframe = t->c_stack;
    store(t->tstate, tstate_at::interp, kInterpreter, "interp");
    store(t->tstate, tstate_at::native_thread_id, static_cast<std::uint64_t>(t->tid), "tid");
    store(t->tstate, tstate_at::context, 0, "context");
    store(t->tstate, tstate_at::context_ver, 1, "ver");
    store(t->tstate, tstate_at::chunk, 0, "chunk");
    store(t->tstate, tstate_at::top, 0, "top");
    if (has_cframe(layout_)) {
        store(t->cframe, 0, 0, "cframe");
        store(t->cframe, 8, 0, "cframe");
        store_pointer(t->tstate, tstate_at::frame, t->cframe, "cframe");
    } else {
        store(t->tstate, tstate_at::frame, 0, "frame");
    }
    t->alive = true;
    truth_changed();
    emit(Kind::new_id, t->tstate + tstate_at::id / 8, 0, "thread starts");
}

void Model::thread_start(Thread* t) { init_tstate(t); }

void Model::thread_end(Thread* t) {
    if (!t->frames.empty() || t->contexts.size() > 1) fail("a thread ends in mid-air");
    if (!t->contexts.empty()) {
        Context* context = t->contexts.back();
        t->contexts.clear();
        truth_changed();
        store(t->tstate, tstate_at::context, 0, "context cleared");
        context_free(context);
    }
    for (; !t->chunks.empty(); t->chunks.pop_back()) release(t->chunks.back().at);
    t->leaf = t->top = nullptr;
    // Another object lives here for a while.
    for (std::uint32_t at = 0; at < tstate_at::size; at += 8) {
        if (at == tstate_at::id) {
            t->alive = false;  // until here it is a thread without frames
            truth_changed();
        }
        store(t->tstate, at, 0xdddddddddddddd00u + at, "thread state freed");
    }
}

// --- Frames

std::uint64_t* Model::push_data(Thread* t, std::uint32_t words) {
    const bool fits =
        !t->chunks.empty() && t->top + words <= t->chunks.back().at + t->chunks.back().words;
    if (fits) {
        std::uint64_t* frame = t->top;
        t->top += words;
        store_pointer(t->tstate, tstate_at::top, t->top, "push");
        return frame;
    }
    const std::uint32_t size = std::max(kChunkWords, words + 8);
    std::uint64_t* chunk = allocate(size);
    std::uint64_t* old = t->chunks.empty() ? nullptr : t->chunks.back().at;
    store_pointer(chunk, chunk_at::previous, old, "new chunk");
    store(chunk, chunk_at::size, size * 8, "new chunk");
    store(chunk, chunk_at::top, 0, "new chunk");
    if (old != nullptr) {
        t->chunks.back().saved_top = t->top;
        store(old, chunk_at::top, static_cast<std::uint64_t>(t->top - (old + chunk_at::data / 8)),
              "old chunk's top");
    }
    store_pointer(t->tstate, tstate_at::chunk, chunk, "switch chunk");
    // The root chunk's first element is skipped, so that it is never freed by a pop.
    std::uint64_t* frame = chunk + chunk_at::data / 8 + (old == nullptr ? 1 : 0);
    t->chunks.push_back({chunk, size, nullptr});
    t->top = frame + words;
    store_pointer(t->tstate, tstate_at::top, t->top, "push");
    return frame;
}

void Model::pop_data(Thread* t, std::uint64_t* frame) {
    const Chunk& live = t->chunks.back();
    if (frame != live.at + chunk_at::data / 8) {
        t->top = frame;
        store_pointer(t->tstate, tstate_at::top, t->top, "pop");
        return;
    }
    std::uint64_t* chunk = live.at;
    t->chunks.pop_back();
    t->top = t->chunks.back().saved_top;
    store_pointer(t->tstate, tstate_at::top, t->top, "pop");
    store_pointer(t->tstate, tstate_at::chunk, t->chunks.back().at, "drop chunk");
    release(chunk);
}

void Model::init_frame(std::uint64_t* frame, const Function* f, std::uint8_t owner,
                       std::uint32_t locals) {
    store_pointer(frame, frame_at::code, f->code, "frame code");
    if (has_shims(layout_)) store(frame, frame_at::previous, 0, "frame previous");
    store(frame, frame_at::instruction, reinterpret_cast<std::uint64_t>(f->code) + code_at::size,
          "frame instruction");
    store(frame, frame_at::owner, owner, "frame owner");
    for (std::uint32_t i = 0; i < locals; ++i) store(frame, frame_at::size + 8 * i, 0, "local");
}

void Model::set_leaf(Thread* t, std::uint64_t* frame, const char* what) {
    t->leaf = frame;
    truth_changed();
    if (has_cframe(layout_)) {
        store_pointer(t->cframe, layout_ == Layout::py311 ? 8 : 0, frame, what);
    } else {
        store_pointer(t->tstate, tstate_at::frame, frame, what);
    }
}

void Model::step(Thread* t) {
    if (t->frames.empty()) return;
    // Enough distinct values that a caller's instruction tells its calls apart.
    static std::uint64_t unit = 0;
    std::uint64_t* frame = t->frames.back().at;
    store(frame, frame_at::instruction,
          reinterpret_cast<std::uint64_t>(t->frames.back().function->code) + code_at::size +
              2 * (unit++ % 64),
          "instruction");
}

void Model::call(Thread* t, const Function* f, std::uint32_t locals) {
    if (t->frames.empty()) fail("a thread begins in C");
    std::uint64_t* frame = push_data(t, frame_at::size / 8 + locals);
    init_frame(frame, f, 0, locals);
    step(t);
    store_pointer(frame, frame_at::previous, t->leaf, "frame previous");
    t->frames.push_back({frame, f, nullptr, nullptr, nullptr, t->leaf});
    t->visible = t->frames.size();
    set_leaf(t, frame, "call");
}

void Model::call_c(Thread* t, const Function* f, std::uint32_t locals) {
    step(t);
    std::uint64_t* frame = push_data(t, frame_at::size / 8 + locals);
    init_frame(frame, f, 0, locals);
    enter_from_c(t, frame, f, nullptr);
}

void Model::enter_from_c(Thread* t, std::uint64_t* frame, const Function* f, Generator* g) {
    if (t->c_depth == kLevels) fail("C stack overflow");
    std::uint64_t* level = t->c_stack + kLevelWords * t->c_depth++;
    std::uint64_t* above = t->leaf;
    std::uint64_t* shim = has_shims(layout_) ? level + kShimWord : nullptr;
    std::uint64_t* cframe = nullptr;
    const std::uint32_t current = layout_ == Layout::py311 ? 8 : 0;
    if (has_cframe(layout_)) {
        cframe = level;
        store_pointer(cframe, current + 8, t->cframe, "cframe previous");
        if (options_.unset_cframe) {
            t->frames.push_back({frame, f, g, nullptr, nullptr, nullptr});
            if (t == sampled()) also_true_ = intern_truth(t->frames.size());
            t->frames.pop_back();
            store_pointer(t->tstate, tstate_at::frame, cframe, "cframe, not yet filled in");
        }
        t->cframe = cframe;
    }
    std::uint64_t* previous = above;
    if (shim != nullptr) {
        // Its code is the interpreter's trampoline, a code object like any other.
        store_pointer(shim, frame_at::code, functions_[0]->code, "shim code");
        store(shim, frame_at::instruction, 0, "shim instruction");
        store(shim, frame_at::owner, 3, "shim owner");
        store_pointer(shim, frame_at::previous, above, "shim previous");
        previous = shim;
    }
    store_pointer(frame, frame_at::previous, previous, "frame previous");
    t->frames.push_back({frame, f, g, shim, cframe, above});
    if (cframe != nullptr && !options_.unset_cframe) {
        store_pointer(cframe, current, frame, "cframe frame");
        t->leaf = frame;
        t->visible = t->frames.size();
        truth_changed();
        store_pointer(t->tstate, tstate_at::frame, cframe, "cframe");
    } else {
        t->visible = t->frames.size();
        set_leaf(t, frame, "call from C");
    }
}

void Model::leave_to_c(Thread* t, bool clear_previous, bool pop) {
    const ModelFrame frame = t->frames.back();
    t->frames.pop_back();
    t->visible = t->frames.size();
    if (frame.shim != nullptr) set_leaf(t, frame.shim, "return to the shim");
    const auto back_to_caller = [&] {
        if (frame.cframe != nullptr) {
            t->cframe = frame.cframe;
            std::uint64_t* outer = nullptr;
            for (std::size_t i = t->frames.size(); i-- > 0 && outer == nullptr;) {
                outer = t->frames[i].cframe;
            }
            t->cframe = outer != nullptr ? outer : t->c_stack;
            t->leaf = frame.above;
            truth_changed();
            store_pointer(t->tstate, tstate_at::frame, t->cframe, "return to C");
        } else {
            set_leaf(t, frame.above, "return to C");
        }
    };
    if (layout_ == Layout::py311) back_to_caller();
    if (clear_previous) store(frame.at, frame_at::previous, 0, "generator's previous cleared");
    if (pop) pop_data(t, frame.at);
    if (layout_ != Layout::py311) back_to_caller();
    --t->c_depth;
}

void Model::ret(Thread* t) {
    const ModelFrame frame = t->frames.back();
    const bool generator = frame.generator != nullptr;
    if (frame.cframe != nullptr || frame.shim != nullptr) {
        leave_to_c(t, generator, !generator);
        return;
    }
    t->frames.pop_back();
    t->visible = t->frames.size();
    set_leaf(t, frame.above, "return");
    if (generator) {
        store(frame.at, frame_at::previous, 0, "generator's previous cleared");
    } else {
        pop_data(t, frame.at);
    }
}

Generator* Model::generator_new(const Function* f) {
    generators_.push_back(std::make_unique<Generator>());
    Generator* g = generators_.back().get();
    g->at = allocate(10);
    g->frame = g->at + 4;
    g->function = f;
    init_frame(g->frame, f, 1, 2);
    store(g->frame, frame_at::previous, 0, "generator's previous");
    return g;
}

void Model::generator_free(Generator* g) {
    release(g->at);
    store(g->at, 0, 0, "generator freed");
}

void Model::resume(Thread* t, Generator* g) {
    if (layout_ == Layout::py311) return resume_c(t, g);
    step(t);
    store_pointer(g->frame, frame_at::previous, t->leaf, "generator's previous");
    t->frames.push_back({g->frame, g->function, g, nullptr, nullptr, t->leaf});
    t->visible = t->frames.size();
    set_leaf(t, g->frame, "resume");
}

void Model::resume_c(Thread* t, Generator* g) {
    step(t);
    enter_from_c(t, g->frame, g->function, g);
}

void Model::yield(Thread* t) {
    step(t);
    ret(t);
}

// --- Code objects and links

const Function* Model::function() { return function_new(); }

const Function* Model::function_new() {
    functions_.push_back(std::make_unique<Function>());
    Function* f = functions_.back().get();
    f->number = static_cast<std::uint32_t>(functions_.size() - 1);
    f->code = allocate(code_at::size / 8 + 2);
    store(f->code, kTypeAt, kCodeType, "code type");
    store(f->code, code_at::first_line, f->number, "code number");
    store(f->code, code_at::units, 64, "code units");
    return f;
}

void Model::function_free(const Function* f) {
    emit(Kind::code_death, f->code, 0, "code dies");
    release(f->code);
    store(f->code, 0, 0, "code freed");
}

int Model::link_start() {
    const auto number = static_cast<int>(link_refs_.size());
    link_refs_.push_back(1);
    records_.push_back(nullptr);
    emit(Kind::link_make, nullptr, static_cast<std::uint64_t>(number), "link made");
    return number;
}

void Model::link_end(int link) {
    if (--link_refs_[static_cast<std::size_t>(link)] == 0) {
        emit(Kind::link_drop, nullptr, static_cast<std::uint64_t>(link), "link freed");
    }
}

// --- Contexts

Value* Model::value_new(int link) {
    values_.push_back(std::make_unique<Value>());
    Value* value = values_.back().get();
    value->at = allocate(6);
    value->link = link;
    store(value->at, kTypeAt, kValueType, "value type");
    if (link >= 0) {
        ++link_refs_[static_cast<std::size_t>(link)];
        emit(Kind::store_record, value->at + value_at::record / 8, static_cast<std::uint64_t>(link),
             "value record");
        emit(Kind::store_serial, value->at + value_at::serial / 8, static_cast<std::uint64_t>(link),
             "value serial");
    } else {
        store(value->at, value_at::record, 0, "value record");
        store(value->at, value_at::serial, 0, "value serial");
    }
    return value;
}

void Model::value_drop(Value* value) {
    if (value == nullptr || --value->refs > 0) return;
    store(value->at, value_at::record, 0, "value freed");
    store(value->at, value_at::serial, 0, "value freed");
    release(value->at);
    if (value->link >= 0) link_end(value->link);
}

Hamt* Model::hamt_new(Value* ours, bool other) {
    hamts_.push_back(std::make_unique<Hamt>());
    Hamt* hamt = hamts_.back().get();
    hamt->ours = ours;
    hamt->other = other;
    if (ours != nullptr) ++ours->refs;
    hamt->at = allocate(4);
    const auto node = [&](std::uint32_t pairs, std::uint64_t bits) {
        std::uint64_t* at = allocate(4 + 2 * std::max(pairs, 1u));
        store(at, kTypeAt, kBitmapType, "node type");
        store(at, node_at::bits, bits, "node bits");
        return at;
    };
    const auto pair = [&](std::uint64_t* at, std::uint32_t index, std::uint64_t key,
                          const void* value) {
        store(at, node_at::pairs + 16 * index, key, "node key");
        store(at, node_at::pairs + 16 * index + 8, reinterpret_cast<std::uint64_t>(value),
              "node value");
    };
    const std::uint64_t first = 1u << (kVariableHash & 31);
    if (ours != nullptr && other) {
        hamt->child = node(2, 1u << (kVariableHash >> 5 & 31) | 1u << (kOtherHash >> 5 & 31));
        pair(hamt->child, 0, kVariable, ours->at);
        pair(hamt->child, 1, kOtherVariable, nullptr);
        hamt->root = node(1, first);
        pair(hamt->root, 0, 0, hamt->child);
    } else if (ours != nullptr || other) {
        hamt->root = node(1, first);
        pair(hamt->root, 0, ours != nullptr ? kVariable : kOtherVariable,
             ours != nullptr ? ours->at : nullptr);
    } else {
        hamt->root = node(0, 0);
    }
    store(hamt->at, kTypeAt, kContextType, "hamt type");
    store_pointer(hamt->at, context_at::hamt_root, hamt->root, "hamt root");
    return hamt;
}

void Model::hamt_drop(Hamt* hamt) {
    if (hamt == nullptr || --hamt->refs > 0) return;
    release(hamt->root);
    if (hamt->child != nullptr) release(hamt->child);
    release(hamt->at);
    value_drop(hamt->ours);
}

void Model::use(Context* context, Hamt* hamt) {
    Hamt* old = context->vars;
    ++hamt->refs;
    context->vars = hamt;
    truth_changed();
    store_pointer(context->at, context_at::vars, hamt->at, "context's variables");
    hamt_drop(old);
}

Token Model::attach(Thread* t, int link) {
    Value* value = value_new(link);
    emit(Kind::slot_begin, nullptr, static_cast<std::uint64_t>(t->slot), "attach begins");
    if (t->contexts.empty()) {
        // The first variable that a thread sets makes its context; context_ver stands still.
        contexts_.push_back(std::make_unique<Context>());
        Context* made = contexts_.back().get();
        made->at = allocate(4);
        made->vars = hamt_new(nullptr, false);
        ++made->vars->refs;
        store(made->at, kTypeAt, kContextType, "context type");
        store_pointer(made->at, context_at::vars, made->vars->at, "context's variables");
        t->contexts.push_back(made);
        truth_changed();
        store_pointer(t->tstate, tstate_at::context, made->at, "first context");
    }
    Context* context = t->contexts.back();
    Token token{context->vars->ours};
    if (token.old != nullptr) ++token.old->refs;
    use(context, hamt_new(value, context->vars->other));
    emit(Kind::slot_done, nullptr, static_cast<std::uint64_t>(t->slot), "attach done");
    return token;
}

void Model::detach(Thread* t, Token token) {
    emit(Kind::slot_begin, nullptr, static_cast<std::uint64_t>(t->slot), "detach begins");
    Context* context = t->contexts.back();
    use(context, hamt_new(token.old, context->vars->other));
    value_drop(token.old);
    emit(Kind::slot_done, nullptr, static_cast<std::uint64_t>(t->slot), "detach done");
}

void Model::set_other(Thread* t) {
    if (t->contexts.empty()) fail("no context to set a variable in");
    Context* context = t->contexts.back();
    use(context, hamt_new(context->vars->ours, true));
}

Context* Model::context_copy(Thread* t) {
    contexts_.push_back(std::make_unique<Context>());
    Context* made = contexts_.back().get();
    made->at = allocate(4);
    made->vars = t->contexts.empty() ? hamt_new(nullptr, false) : t->contexts.back()->vars;
    ++made->vars->refs;
    store(made->at, kTypeAt, kContextType, "context type");
    store_pointer(made->at, context_at::vars, made->vars->at, "context's variables");
    return made;
}

void Model::context_free(Context* context) {
    store(context->at, 0, 0, "context freed");
    release(context->at);
    hamt_drop(context->vars);
}

void Model::context_enter(Thread* t, Context* context) {
    t->contexts.push_back(context);
    truth_changed();
    store_pointer(t->tstate, tstate_at::context, context->at, "enter context");
    if (!options_.versions_never_move) {
        emit(Kind::add_one, t->tstate + tstate_at::context_ver / 8, 0, "context_ver");
    }
}

void Model::context_exit(Thread* t) {
    t->contexts.pop_back();
    truth_changed();
    store_pointer(t->tstate, tstate_at::context,
                  t->contexts.empty() ? nullptr : t->contexts.back()->at, "exit context");
    if (!options_.versions_never_move) {
        emit(Kind::add_one, t->tstate + tstate_at::context_ver / 8, 0, "context_ver");
    }
}

// --- The moving memory

void MovingMemory::arm(Grain grain, const Move* moves, int count) {
    grain_ = grain;
    count_ = count;
    next_ = 0;
    point_ = done_ = 0;
    std::copy(moves, moves + count, moves_);
}

void MovingMemory::point() noexcept {
    while (next_ < count_ && moves_[next_].point == point_) {
        model_.advance(moves_[next_].steps);
        done_ += moves_[next_].steps;
        ++next_;
    }
    ++point_;
}

bool MovingMemory::read(const ReadRequest* requests, int count) noexcept {
    bool ok = true;
    for (int i = 0; i < count && ok; ++i) {
        const ReadRequest& request = requests[i];
        if (grain_ == Grain::request) point();
        if (!model_.holds(request.address, request.size)) {
            ok = false;
            break;
        }
        auto* into = static_cast<unsigned char*>(request.into);
        std::uintptr_t from = request.address;
        std::uint32_t left = request.size;
        while (left != 0) {
            const std::uint32_t step = std::min(left, static_cast<std::uint32_t>(8 - from % 8));
            if (grain_ == Grain::word) point();
            std::memcpy(into, reinterpret_cast<const void*>(from), step);
            into += step;
            from += step;
            left -= step;
        }
    }
    point();
    return ok;
}

}  // namespace otel_proflink::test
