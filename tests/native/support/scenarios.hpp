// SPDX-License-Identifier: Apache-2.0
//
// What the sampled thread and its neighbour do, as loops for the interpreter model. Each unit of
// work runs a function of its own under a link of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "support/interpreter_model.hpp"

namespace otel_proflink::test {

struct Scenario {
    const char* name;
    void (*build)(Model&);
};

const std::vector<Scenario>& scenarios();

// A loop of about `actions` random calls, attaches, context switches, generators and neighbours.
void build_random(Model& model, std::uint64_t seed, int actions);

}  // namespace otel_proflink::test
