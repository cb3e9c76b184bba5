// SPDX-License-Identifier: Apache-2.0
//
// Takes snapshots of a model that moves while they are taken, and judges each by what was true.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "snapshot.hpp"
#include "support/interpreter_model.hpp"

namespace otel_proflink::test {

struct Tally {
    std::uint64_t snapshots = 0;
    std::uint64_t ok = 0;  // ok or no_frames, and true at one instant while it was taken
    std::uint64_t torn = 0;
    std::uint64_t gone = 0;
    // Results that were true at no instant, by what is wrong with them.
    std::uint64_t wrong_label = 0;  // a function of the chain never ran under the label
    std::uint64_t wrong_pair = 0;   // labels right, but a call that was never made
    std::uint64_t wrong_whole = 0;  // each label and call right, the whole never at one instant
    std::uint64_t moved = 0;        // snapshots that the model changed under
    std::uint64_t moved_ok = 0;
    std::string first_wrong;

    std::uint64_t wrong() const { return wrong_label + wrong_pair + wrong_whole; }
    void add(const Tally& other);
    std::string text() const;
};

class SnapshotChecker {
  public:
    struct Mutation {
        bool slot_elsewhere = false;   // the thread's counters are another thread's
        bool version_is_zero = false;  // context_ver is read where there is always 0
        bool no_code_watcher = false;  // nobody says that code objects die
    };

    explicit SnapshotChecker(Model& model) : SnapshotChecker(model, Mutation{}) {}
    SnapshotChecker(Model& model, Mutation mutation);

    // One snapshot with `moves`; the model is then moved on to a total of `stride` steps.
    void take(MovingMemory::Grain grain, const MovingMemory::Move* moves, int count,
              std::uint32_t stride, Tally* tally);

    // Points at which the longest snapshot can be interrupted, over a whole loop.
    std::uint32_t most_points(MovingMemory::Grain grain);

    // Every start x point x steps; if that is more than `budget`, only some of the points.
    Tally one_move(MovingMemory::Grain grain, const std::vector<std::uint32_t>& steps,
                   std::uint64_t budget);
    // Every start x pair of points x pair of steps out of `steps`; if that is more than `budget`,
    // an even selection of it.
    Tally two_moves(MovingMemory::Grain grain, const std::vector<std::uint32_t>& steps,
                    std::uint64_t budget);
    // Up to `most_moves` moves at random points.
    Tally storm(std::uint64_t seed, int most_moves, std::uint64_t count);

  private:
    class Visitor final : public FrameVisitor {
      public:
        Visitor(Memory& memory, std::vector<std::uintptr_t>* deaths)
            : memory_(memory), deaths_(deaths) {}
        bool visit(const Chain& chain) noexcept override;
        std::uint32_t functions[64];
        std::uint32_t count = 0;

      private:
        Memory& memory_;
        std::vector<std::uintptr_t>* deaths_;
    };

    void judge(SnapshotResult result, std::uint32_t start, std::uint32_t steps, Tally* tally);

    Model& model_;
    Mutation mutation_;
    ProflinkAbi abi_;
    ContextKey context_key_;
    MovingMemory memory_;
    Snapshotter snapshotter_;
    std::vector<std::uintptr_t> no_deaths_;
    Visitor visitor_;
    AttachSlot still_{};
    ThreadKey key_{};
    ThreadCache cache_;
    std::unique_ptr<Chain> chain_;
};

}  // namespace otel_proflink::test
