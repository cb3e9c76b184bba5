// SPDX-License-Identifier: Apache-2.0
//
// A model of what CPython does to its memory, one store at a time, and of what is true meanwhile.
//
// A scenario is built once, as a loop of micro-steps with absolute addresses; it then runs in any
// number of steps between any two reads. The order of the stores is CPython's. Freed objects keep
// their bytes and their addresses are handed out again, last freed first, which is the worst case.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attach_slots.hpp"
#include "link.hpp"
#include "memory.hpp"
#include "snapshot.hpp"
#include "support/synthetic_abi.hpp"

namespace otel_proflink::test {

// What is true of the sampled thread at one instant.
struct Truth {
    bool alive = true;
    int link = -1;                     // number of the model's link, -1: none
    std::vector<std::uint32_t> chain;  // functions, leaf first
    std::uint64_t hash = 0;

    bool contains(std::uint32_t function) const;
    bool calls(std::uint32_t callee, std::uint32_t caller) const;
};

std::uint64_t truth_hash(int link, const std::uint32_t* chain, std::size_t count);

struct Value {
    std::uint64_t* at = nullptr;
    int link = -1;
    int refs = 0;
};

struct Hamt {
    std::uint64_t* at = nullptr;
    std::uint64_t* root = nullptr;
    std::uint64_t* child = nullptr;
    Value* ours = nullptr;
    bool other = false;
    int refs = 0;
};

struct Context {
    std::uint64_t* at = nullptr;
    Hamt* vars = nullptr;
};

struct Function {
    std::uint32_t number = 0;
    std::uint64_t* code = nullptr;
};

struct Generator {
    std::uint64_t* at = nullptr;
    std::uint64_t* frame = nullptr;
    const Function* function = nullptr;
};

struct ModelFrame {
    std::uint64_t* at;
    const Function* function;
    Generator* generator;   // nullptr: on the data stack
    std::uint64_t* shim;    // nullptr: none
    std::uint64_t* cframe;  // nullptr: not entered from C
    std::uint64_t* above;   // the leaf before this frame was pushed
};

struct Chunk {
    std::uint64_t* at;
    std::uint32_t words;
    std::uint64_t* saved_top;
};

struct Thread {
    std::uint64_t* tstate = nullptr;
    std::uint64_t* c_stack = nullptr;
    std::uint64_t* cframe = nullptr;
    std::uint64_t* leaf = nullptr;  // the current frame or shim
    std::uint64_t* top = nullptr;
    std::vector<Chunk> chunks;
    std::vector<ModelFrame> frames;  // outermost first
    std::vector<Context*> contexts;  // entered; the last is current
    std::size_t visible = 0;         // frames that the leaf pointer shows
    std::uint32_t c_depth = 0;
    int slot = 0;
    std::int32_t tid = 0;
    bool alive = true;
};

struct Token {
    Value* old = nullptr;
};

class Model {
  public:
    struct Options {
        // 3.11 and 3.12 point the thread at a new _PyCFrame a few instructions before they fill it
        // in: for so long its frame pointer is whatever the C stack held.
        bool unset_cframe = false;
        bool slots_never_move = false;     // mutation: attaches go uncounted
        bool versions_never_move = false;  // mutation: context_ver stands still
    };

    Model(Layout layout, Options options);
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    ~Model();

    // --- Building. The first thread is the sampled one.
    Thread* sampled() { return threads_[0].get(); }
    Thread* other() { return threads_[1].get(); }
    const Function* function();      // a new function that lives for ever
    const Function* function_new();  // one that can be freed
    void function_free(const Function* function);
    int link_start();         // a span starts: its link's record is made
    void link_end(int link);  // the span is gone; values may still hold the link

    void call(Thread* t, const Function* f, std::uint32_t locals = 2);    // Python to Python
    void call_c(Thread* t, const Function* f, std::uint32_t locals = 2);  // through C
    void ret(Thread* t);
    void step(Thread* t);  // the leaf executes an instruction
    Generator* generator_new(const Function* f);
    void generator_free(Generator* g);
    void resume(Thread* t, Generator* g);
    void resume_c(Thread* t, Generator* g);
    void yield(Thread* t);

    Token attach(Thread* t, int link);  // -1: a context without a span
    void detach(Thread* t, Token token);
    void set_other(Thread* t);  // ContextVar.set of a variable that is not ours
    Context* context_copy(Thread* t);
    void context_free(Context* context);
    void context_enter(Thread* t, Context* context);
    void context_exit(Thread* t);

    void thread_end(Thread* t);
    void thread_start(Thread* t);
    void nop();

    // From here on steps belong to the loop; before, they are done once.
    void begin_loop();
    // Pads the loop to a prime number of steps.
    void end_loop();

    // --- Running
    std::uint32_t length() const { return static_cast<std::uint32_t>(ops_.size()); }
    std::uint32_t position() const { return position_; }
    const Truth& truth_at(std::uint32_t position) const {
        return truths_[truth_before_[position % ops_.size()].first];
    }
    // Just as true: a function that C is about to start may be shown as started.
    const Truth& also_true_at(std::uint32_t position) const {
        return truths_[truth_before_[position % ops_.size()].second];
    }
    void advance(std::uint32_t steps);
    void rewind_to(std::uint32_t position);  // runs forward until there

    Layout layout() const { return layout_; }
    // Code objects freed since the last call, as a code watcher tells them.
    std::vector<std::uintptr_t>& deaths() { return deaths_; }
    bool holds(std::uintptr_t address, std::size_t size) const;
    ThreadKey key() const;
    std::uint64_t serial_of(int link) const;
    static std::uint32_t link_number(const LinkData& link);

    const char* trace(std::uint32_t position) const { return ops_[position % ops_.size()].what; }

  private:
    enum class Kind : std::uint8_t {
        nop,
        store,
        add_one,
        new_id,
        slot_begin,
        slot_done,
        code_death,
        link_make,
        link_drop,
        store_record,
        store_serial,
    };
    struct Op {
        Kind kind;
        std::uint64_t* at;
        std::uint64_t value;
        std::uint32_t truth;
        std::uint32_t also_true;
        const char* what;
    };

    std::uint64_t* allocate(std::uint32_t words);
    void release(std::uint64_t* block);
    void emit(Kind kind, std::uint64_t* at, std::uint64_t value, const char* what);
    void store(std::uint64_t* base, std::uint32_t offset, std::uint64_t value, const char* what);
    template <typename T>
    void store_pointer(std::uint64_t* base, std::uint32_t offset, T* value, const char* what) {
        store(base, offset, reinterpret_cast<std::uint64_t>(value), what);
    }
    std::uint32_t intern_truth(std::size_t visible);
    void truth_changed();
    void execute(const Op& op);

    std::uint64_t* push_data(Thread* t, std::uint32_t words);
    void pop_data(Thread* t, std::uint64_t* frame);
    void set_leaf(Thread* t, std::uint64_t* frame, const char* what);
    void init_frame(std::uint64_t* frame, const Function* f, std::uint8_t owner,
                    std::uint32_t locals);
    void enter_from_c(Thread* t, std::uint64_t* frame, const Function* f, Generator* g);
    void leave_to_c(Thread* t, bool clear_previous, bool pop);

    Value* value_new(int link);
    void value_drop(Value* value);
    Hamt* hamt_new(Value* ours, bool other);
    void hamt_drop(Hamt* hamt);
    void use(Context* context, Hamt* hamt);
    void init_tstate(Thread* t);
    void add_thread(int slot, std::int32_t tid);

    Layout layout_;
    Options options_;
    std::vector<std::uint64_t> arena_;
    std::size_t bump_ = 0;
    std::map<std::uint32_t, std::vector<std::uint64_t*>> free_;
    std::map<std::uint64_t*, std::uint32_t> sizes_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<std::unique_ptr<Function>> functions_;
    std::vector<std::unique_ptr<Generator>> generators_;
    std::vector<std::unique_ptr<Value>> values_;
    std::vector<std::unique_ptr<Hamt>> hamts_;
    std::vector<std::unique_ptr<Context>> contexts_;
    std::vector<int> link_refs_;

    bool looping_ = false;
    std::vector<Op> ops_;
    std::vector<std::pair<std::uint32_t, std::uint32_t>> truth_before_;
    std::vector<Truth> truths_;
    std::map<std::uint64_t, std::uint32_t> truth_index_;
    std::uint32_t truth_ = 0;
    std::uint32_t also_true_ = 0;
    std::map<std::uint64_t*, std::uint32_t> live_at_loop_;

    std::uint32_t position_ = 0;
    std::vector<std::uintptr_t> deaths_;
    std::uint64_t next_id_ = 100;
    std::vector<LinkRecord*> records_;
    AttachSlot slots_[2]{};
    AttachSlot frozen_slot_{};
};

// The memory that the snapshot reads: the model, which moves on at chosen points.
class MovingMemory final : public Memory {
  public:
    // What counts as a point: each word, or each request of a batch. The end of each call is one
    // more, always.
    enum class Grain { word, request };
    struct Move {
        std::uint32_t point;
        std::uint32_t steps;
    };
    static constexpr int kMaxMoves = 6;

    explicit MovingMemory(Model& model) : model_(model) {}
    using Memory::read;
    bool read(const ReadRequest* requests, int count) noexcept override;

    // `moves` ascending by point.
    void arm(Grain grain, const Move* moves, int count);
    std::uint32_t points() const { return point_; }
    std::uint32_t steps_done() const { return done_; }

  private:
    void point() noexcept;

    Model& model_;
    Grain grain_ = Grain::word;
    Move moves_[kMaxMoves]{};
    int count_ = 0;
    int next_ = 0;
    std::uint32_t point_ = 0;
    std::uint32_t done_ = 0;
};

}  // namespace otel_proflink::test
