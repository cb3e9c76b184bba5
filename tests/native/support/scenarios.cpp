// SPDX-License-Identifier: Apache-2.0
#include "support/scenarios.hpp"

#include <random>

namespace otel_proflink::test {
namespace {

// The usual start: C calls main, main calls a loop. The thread has a context from here on.
void start_main(Model& m) {
    m.call_c(m.sampled(), m.function());
    m.call(m.sampled(), m.function());
    m.detach(m.sampled(), m.attach(m.sampled(), -1));
}

// Back-to-back spans, attached by the caller; frames and values recycle their addresses.
void spans(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* work[3] = {m.function(), m.function(), m.function()};
    const Function* helper[2] = {m.function(), m.function()};
    m.begin_loop();
    for (int i = 0; i < 3; ++i) {
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        if (i == 1) {
            m.call_c(t, work[i]);
        } else {
            m.call(t, work[i]);
        }
        m.call(t, helper[i & 1], 0);
        m.ret(t);
        m.ret(t);
        m.detach(t, token);
        m.link_end(link);
        m.step(t);
    }
    m.end_loop();
}

// A child span inside each, and a context without a span in between.
void nested(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* outer[2] = {m.function(), m.function()};
    const Function* inner[2] = {m.function(), m.function()};
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        m.call(t, outer[i]);
        const int a = m.link_start();
        const Token ta = m.attach(t, a);
        m.step(t);
        const int b = m.link_start();
        const Token tb = m.attach(t, b);
        m.call_c(t, inner[i]);
        m.ret(t);
        m.detach(t, tb);
        m.link_end(b);
        const Token tn = m.attach(t, -1);
        m.call(t, inner[1 - i]);
        m.ret(t);
        m.detach(t, tn);
        m.step(t);
        m.detach(t, ta);
        m.link_end(a);
        m.ret(t);
    }
    m.end_loop();
}

// The same C stack level and generator addresses, called from different depths of the data stack,
// where frames of an earlier span still lie.
void depths(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* p = m.function();
    const Function* q = m.function();
    const Function* r = m.function();
    const Function* f = m.function();
    const Function* g = m.function();
    const Function* h = m.function();
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        const int a = m.link_start();
        const Token ta = m.attach(t, a);
        m.call(t, p);  // a deep call leaves its frames behind
        m.call(t, q);
        m.call(t, i == 0 ? r : h);
        m.ret(t);
        m.ret(t);
        m.ret(t);
        m.detach(t, ta);
        m.link_end(a);
        const int b = m.link_start();
        const Token tb = m.attach(t, b);
        m.call(t, p);
        m.call_c(t, f);  // shallow
        m.ret(t);
        m.ret(t);
        m.call(t, q);
        m.call(t, r);
        m.call(t, h, 0);
        m.call_c(t, g);  // deep, through the same C stack level
        m.ret(t);
        m.ret(t);
        m.ret(t);
        m.ret(t);
        m.detach(t, tb);
        m.link_end(b);
    }
    m.end_loop();
}

// An event loop with two tasks: each step enters the task's context, resumes its coroutine and
// leaves at the next await, A, B, A, B.
void tasks(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* task[2] = {m.function(), m.function()};
    const Function* work[2] = {m.function(), m.function()};
    m.begin_loop();
    int link[2];
    Context* context[2];
    Generator* coroutine[2];
    Token token[2];
    for (int i = 0; i < 2; ++i) {
        link[i] = m.link_start();
        context[i] = m.context_copy(t);
        coroutine[i] = m.generator_new(task[i]);
        m.context_enter(t, context[i]);
        m.resume_c(t, coroutine[i]);
        token[i] = m.attach(t, link[i]);
        m.call(t, work[i]);
        m.ret(t);
        m.yield(t);
        m.context_exit(t);
    }
    for (int i = 0; i < 2; ++i) {
        m.context_enter(t, context[i]);
        m.resume_c(t, coroutine[i]);
        m.call(t, work[i]);
        m.ret(t);
        m.yield(t);
        m.context_exit(t);
    }
    for (int i = 0; i < 2; ++i) {
        m.context_enter(t, context[i]);
        m.resume_c(t, coroutine[i]);
        m.detach(t, token[i]);
        m.link_end(link[i]);
        m.step(t);
        m.ret(t);
        m.generator_free(coroutine[i]);
        m.context_exit(t);
        m.context_free(context[i]);
    }
    m.end_loop();
}

// Context.run() of work whose link was attached before the context was copied: no attach at all.
void context_run(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* work[2] = {m.function(), m.function()};
    const Function* helper = m.function();
    m.begin_loop();
    // The loop must end as it began: what it sets, it sets in a context of its own.
    Context* own = m.context_copy(t);
    m.context_enter(t, own);
    Context* context[2];
    int link[2];
    for (int i = 0; i < 2; ++i) {
        link[i] = m.link_start();
        const Token token = m.attach(t, link[i]);
        context[i] = m.context_copy(t);
        m.detach(t, token);
        m.link_end(link[i]);
    }
    for (const int i : {0, 1, 0}) {
        m.context_enter(t, context[i]);
        m.call_c(t, work[i]);
        m.call(t, helper);
        m.ret(t);
        m.ret(t);
        m.context_exit(t);
        m.step(t);
    }
    // Runs in a context that is freed at once; the next one gets its address.
    for (int i = 0; i < 2; ++i) {
        m.context_enter(t, context[i]);
        m.call_c(t, work[i]);
        m.ret(t);
        m.context_exit(t);
        m.context_free(context[i]);
    }
    m.context_exit(t);
    m.context_free(own);
    m.end_loop();
}

// Generators between frames, resumed from different callers, freed and made again in place.
void generators(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* body[2] = {m.function(), m.function()};
    const Function* caller[2] = {m.function(), m.function()};
    const Function* leaf = m.function();
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        Generator* g = m.generator_new(body[i]);
        m.call(t, caller[0]);
        m.resume(t, g);
        m.call(t, leaf);
        m.ret(t);
        m.yield(t);
        m.ret(t);
        if (i == 1) {
            m.detach(t, token);
            m.link_end(link);
        }
        m.call(t, caller[0], 4);
        m.call(t, caller[1]);
        m.resume_c(t, g);
        m.call(t, leaf);
        m.ret(t);
        m.ret(t);
        m.generator_free(g);
        Generator* again = m.generator_new(body[1 - i]);
        m.resume(t, again);
        m.call_c(t, leaf);
        m.ret(t);
        m.ret(t);
        m.generator_free(again);
        m.ret(t);
        m.ret(t);
        if (i == 0) {
            m.detach(t, token);
            m.link_end(link);
        }
    }
    m.end_loop();
}

// A C thread that makes a thread state for each call into Python: same address, same thread id.
void thread_states(Model& m) {
    Thread* t = m.sampled();
    const Function* work[2] = {m.function(), m.function()};
    const Function* helper = m.function();
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        m.call_c(t, work[i]);
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        m.call(t, helper);
        m.ret(t);
        m.step(t);
        if (i == 0) m.detach(t, token);
        m.link_end(link);
        m.ret(t);
        m.thread_end(t);
        m.thread_start(t);
    }
    m.end_loop();
}

// exec() in a loop: code objects of one address, called at one frame address.
void code_objects(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* stay = m.function();
    m.begin_loop();
    for (int i = 0; i < 3; ++i) {
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        const Function* made = m.function_new();
        m.call(t, made);
        m.step(t);
        m.ret(t);
        m.function_free(made);
        m.call(t, stay);
        const Function* unused = m.function_new();
        m.function_free(unused);
        m.ret(t);
        const Function* third = m.function_new();
        m.call(t, third);
        m.ret(t);
        m.function_free(third);
        m.detach(t, token);
        m.link_end(link);
    }
    m.end_loop();
}

// Whenever the sampled thread waits, its neighbour attaches, runs generators and makes contexts
// out of the objects that the sampled thread has just freed.
void neighbour(Model& m) {
    Thread* t = m.sampled();
    Thread* n = m.other();
    start_main(m);
    m.call_c(n, m.function());
    const Function* work[2] = {m.function(), m.function()};
    const Function* body[2] = {m.function(), m.function()};
    const Function* theirs = m.function();
    const Function* leaf = m.function();
    m.detach(n, m.attach(n, -1));
    m.set_other(t);
    m.set_other(n);
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        m.call(t, work[i]);
        m.set_other(t);  // frees the old HAMT
        const int foreign = m.link_start();
        const Token taken = m.attach(n, foreign);
        m.call(n, theirs);
        m.ret(n);
        m.detach(n, taken);
        m.link_end(foreign);
        m.set_other(t);
        Generator* g = m.generator_new(body[i]);
        m.resume(t, g);
        m.call(t, leaf);
        m.ret(t);
        m.ret(t);
        m.generator_free(g);
        Generator* h = m.generator_new(theirs);
        m.resume_c(n, h);
        m.step(n);
        m.ret(n);
        m.generator_free(h);
        m.set_other(t);
        m.ret(t);
        m.detach(t, token);
        m.link_end(link);
    }
    m.end_loop();
}

// Frames that do not fit open new chunks, which go as their first frame does.
void chunks(Model& m) {
    Thread* t = m.sampled();
    start_main(m);
    const Function* work[2] = {m.function(), m.function()};
    const Function* deep[4] = {m.function(), m.function(), m.function(), m.function()};
    m.begin_loop();
    for (int i = 0; i < 2; ++i) {
        const int link = m.link_start();
        const Token token = m.attach(t, link);
        m.call(t, work[i], 3);
        m.call(t, deep[i], 8);
        m.call(t, deep[2], i == 0 ? 12 : 60);  // the second one needs a larger chunk
        m.call_c(t, deep[3], 10);
        m.ret(t);
        m.ret(t);
        m.call(t, deep[3], 18);
        m.ret(t);
        m.ret(t);
        m.ret(t);
        m.detach(t, token);
        m.link_end(link);
    }
    m.end_loop();
}

// --- Random programs

class Wanderer {
  public:
    Wanderer(Model& model, std::uint64_t seed) : m_(model), random_(seed) {
        for (int i = 0; i < 40; ++i) functions_.push_back(m_.function());
    }

    void start() {
        start_main(m_);
        m_.call_c(m_.other(), m_.function());
        m_.detach(m_.other(), m_.attach(m_.other(), -1));
    }

    void wander(int actions) {
        // The loop must end as it began: what it sets, it sets in contexts of its own.
        Context* own[2];
        Thread* threads[2] = {m_.sampled(), m_.other()};
        for (int i = 0; i < 2; ++i) {
            own[i] = m_.context_copy(threads[i]);
            m_.context_enter(threads[i], own[i]);
            m_.set_other(threads[i]);
        }
        left_ = actions;
        while (left_ > 0) act(m_.sampled(), 0);
        for (int i = 0; i < 2; ++i) {
            m_.context_exit(threads[i]);
            m_.context_free(own[i]);
        }
    }

  private:
    std::uint64_t below(std::uint64_t n) { return random_() % n; }
    const Function* any() { return functions_[below(functions_.size())]; }

    void few(Thread* t, int depth) {
        for (std::uint64_t n = below(3); n-- > 0;) act(t, depth + 1);
    }

    void act(Thread* t, int depth) {
        --left_;
        if (depth > 6) return m_.step(t);
        switch (below(14)) {
            case 0:
            case 1:
            case 2:
                m_.call(t, any(), static_cast<std::uint32_t>(below(5)));
                few(t, depth);
                m_.ret(t);
                break;
            case 3:
                m_.call_c(t, any(), static_cast<std::uint32_t>(below(5)));
                few(t, depth);
                m_.ret(t);
                break;
            case 4: {
                const Function* made = m_.function_new();
                m_.call(t, made);
                few(t, depth);
                m_.ret(t);
                m_.function_free(made);
                break;
            }
            case 5:
            case 6: {
                const int link = below(6) == 0 ? -1 : m_.link_start();
                const Token token = m_.attach(t, link);
                m_.call(t, any());
                few(t, depth);
                m_.ret(t);
                m_.detach(t, token);
                if (link >= 0) m_.link_end(link);
                break;
            }
            case 7:
                m_.set_other(t);
                break;
            case 8: {
                Context* context = m_.context_copy(t);
                m_.context_enter(t, context);
                m_.call_c(t, any());
                few(t, depth);
                m_.ret(t);
                m_.context_exit(t);
                m_.context_free(context);
                break;
            }
            case 9: {
                Generator* g = m_.generator_new(any());
                for (std::uint64_t n = 1 + below(2); n-- > 0;) {
                    if (below(2) == 0) {
                        m_.resume(t, g);
                    } else {
                        m_.resume_c(t, g);
                    }
                    few(t, depth);
                    m_.yield(t);
                    few(t, depth);
                }
                m_.generator_free(g);
                break;
            }
            case 10:
                two_tasks(t, depth);
                break;
            case 11:
            case 12:
                if (t == m_.sampled()) {
                    act(m_.other(), depth + 2);
                } else {
                    m_.step(t);
                }
                break;
            default:
                m_.step(t);
        }
    }

    void two_tasks(Thread* t, int depth) {
        Context* context[2];
        Generator* coroutine[2];
        Token token[2];
        int link[2];
        for (int i = 0; i < 2; ++i) {
            link[i] = m_.link_start();
            context[i] = m_.context_copy(t);
            coroutine[i] = m_.generator_new(any());
        }
        for (int round = 0; round < 3; ++round) {
            for (int i = 0; i < 2; ++i) {
                m_.context_enter(t, context[i]);
                m_.resume_c(t, coroutine[i]);
                if (round == 0) token[i] = m_.attach(t, link[i]);
                m_.call(t, any());
                few(t, depth + 1);
                m_.ret(t);
                if (round == 2) m_.detach(t, token[i]);
                m_.yield(t);
                m_.context_exit(t);
            }
        }
        for (int i = 0; i < 2; ++i) {
            m_.generator_free(coroutine[i]);
            m_.context_free(context[i]);
            m_.link_end(link[i]);
        }
    }

    Model& m_;
    std::mt19937_64 random_;
    std::vector<const Function*> functions_;
    int left_ = 0;
};

}  // namespace

const std::vector<Scenario>& scenarios() {
    static const std::vector<Scenario> all = {
        {"spans", spans},
        {"nested", nested},
        {"depths", depths},
        {"tasks", tasks},
        {"context_run", context_run},
        {"generators", generators},
        {"thread_states", thread_states},
        {"code_objects", code_objects},
        {"neighbour", neighbour},
        {"chunks", chunks},
    };
    return all;
}

void build_random(Model& model, std::uint64_t seed, int actions) {
    Wanderer wanderer(model, seed);
    wanderer.start();
    model.begin_loop();
    wanderer.wander(actions);
    model.end_loop();
}

}  // namespace otel_proflink::test
