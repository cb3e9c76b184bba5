// SPDX-License-Identifier: Apache-2.0
#include "support/snapshot_checker.hpp"

#include <algorithm>
#include <random>
#include <sstream>

namespace otel_proflink::test {

void Tally::add(const Tally& other) {
    snapshots += other.snapshots;
    ok += other.ok;
    torn += other.torn;
    gone += other.gone;
    wrong_label += other.wrong_label;
    wrong_pair += other.wrong_pair;
    wrong_whole += other.wrong_whole;
    moved += other.moved;
    moved_ok += other.moved_ok;
    if (first_wrong.empty()) first_wrong = other.first_wrong;
}

std::string Tally::text() const {
    std::ostringstream out;
    const auto share = [](std::uint64_t part, std::uint64_t whole) {
        return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
    };
    out.precision(3);
    out << snapshots << " snapshots, ok " << share(ok, snapshots)
        << " % (moved under: " << share(moved_ok, moved) << " %), torn " << torn << ", gone "
        << gone << ", wrong label " << wrong_label << ", pair " << wrong_pair << ", whole "
        << wrong_whole;
    if (!first_wrong.empty()) out << "\n  first: " << first_wrong;
    return out.str();
}

bool SnapshotChecker::Visitor::visit(const Chain& chain) noexcept {
    count = 0;
    for (std::uint32_t i = 0; i < chain.count; ++i) {
        std::uint64_t type = 0;
        std::uint64_t number = 0;
        const ReadRequest requests[] = {
            {chain.frames[i].code + kTypeAt, &type, sizeof(type)},
            {chain.frames[i].code + code_at::first_line, &number, sizeof(number)},
        };
        if (i >= std::size(functions) || !memory_.read(requests, 2) || type != kCodeType) {
            return false;
        }
        functions[count++] = static_cast<std::uint32_t>(number);
    }
    // As CodeTable does: a code object that died since the attempt began may have been replaced.
    for (const std::uintptr_t dead : *deaths_) {
        for (std::uint32_t i = 0; i < chain.count; ++i) {
            if (chain.frames[i].code == dead) return false;
        }
    }
    return true;
}

SnapshotChecker::SnapshotChecker(Model& model, Mutation mutation)
    : model_(model),
      mutation_(mutation),
      abi_(make_abi(model.layout())),
      context_key_(make_key()),
      memory_(model),
      snapshotter_(memory_, abi_, context_key_),
      visitor_(memory_, mutation.no_code_watcher ? &no_deaths_ : &model.deaths()),
      chain_(std::make_unique<Chain>()) {
    still_.tid.store(7001);
    if (mutation.version_is_zero) {
        abi_.thread.context_ver = tstate_at::always_zero;
        abi_.thread.size = tstate_at::always_zero + 8;
    }
}

void SnapshotChecker::take(MovingMemory::Grain grain, const MovingMemory::Move* moves, int count,
                           std::uint32_t stride, Tally* tally) {
    const std::uint32_t start = model_.position();
    if (model_.truth_at(start).alive) {
        const ThreadKey now = model_.key();
        if (now.id != key_.id) cache_ = ThreadCache{};  // the thread list made a new entry
        key_ = now;
        if (mutation_.slot_elsewhere) key_.slot = &still_;
    }
    memory_.arm(grain, moves, count);
    model_.deaths().clear();
    const SnapshotResult result = key_.tstate == 0
                                      ? SnapshotResult::gone
                                      : snapshotter_.take(key_, &cache_, chain_.get(), &visitor_);
    const std::uint32_t steps = memory_.steps_done();
    judge(result, start, steps, tally);
    if (stride > steps) model_.advance(stride - steps);
}

void SnapshotChecker::judge(SnapshotResult result, std::uint32_t start, std::uint32_t steps,
                            Tally* tally) {
    ++tally->snapshots;
    if (steps != 0) ++tally->moved;
    if (result == SnapshotResult::torn) return void(++tally->torn);
    if (result == SnapshotResult::gone) return void(++tally->gone);

    const Label& label = cache_.label;
    const std::uint32_t* chain = visitor_.functions;
    const std::uint32_t count = result == SnapshotResult::ok ? visitor_.count : 0;
    int link = -1;
    if (label.state == LabelState::linked) link = static_cast<int>(Model::link_number(label.link));
    if (label.state == LabelState::unknown) link = -3;
    const std::uint64_t hash = truth_hash(link, chain, count);

    // What was true from the first read to the last, while the thread state was this thread's.
    std::uint32_t last = start;
    for (std::uint32_t p = start; p <= start + steps; ++p) {
        const Truth& truth = model_.truth_at(p);
        if (!truth.alive) break;
        if (truth.hash == hash || model_.also_true_at(p).hash == hash) {
            ++tally->ok;
            if (steps != 0) ++tally->moved_ok;
            return;
        }
        last = p + 1;
    }
    const auto ever = [&](auto what) {
        for (std::uint32_t p = start; p < last; ++p) {
            const Truth& truth = model_.truth_at(p);
            if (truth.alive && (what(truth) || what(model_.also_true_at(p)))) return true;
        }
        return false;
    };
    bool labels = ever([&](const Truth& t) { return t.link == link; });
    bool pairs = true;
    for (std::uint32_t i = 0; i < count; ++i) {
        labels =
            labels && ever([&](const Truth& t) { return t.link == link && t.contains(chain[i]); });
        pairs = pairs && (i + 1 == count ||
                          ever([&](const Truth& t) { return t.calls(chain[i], chain[i + 1]); }));
    }
    if (!labels) {
        ++tally->wrong_label;
    } else if (!pairs) {
        ++tally->wrong_pair;
    } else {
        ++tally->wrong_whole;
    }
    if (!tally->first_wrong.empty()) return;
    std::ostringstream out;
    out << (!labels  ? "label"
            : !pairs ? "pair"
                     : "whole")
        << " at step " << start << " + " << steps << ": link " << link << ", chain";
    for (std::uint32_t i = 0; i < count; ++i) out << ' ' << chain[i];
    out << "; true:";
    std::uint64_t seen = 0;
    for (std::uint32_t p = start; p < last; ++p) {
        const Truth& truth = model_.truth_at(p);
        if (truth.hash == seen) continue;
        seen = truth.hash;
        out << "\n    " << p - start << " (" << model_.trace(p + model_.length() - 1) << ") link "
            << truth.link << ", chain";
        for (const std::uint32_t f : truth.chain) out << ' ' << f;
    }
    tally->first_wrong = out.str();
}

std::uint32_t SnapshotChecker::most_points(MovingMemory::Grain grain) {
    std::uint32_t most = 0;
    Tally ignored;
    for (std::uint32_t i = 0; i < 2 * model_.length(); ++i) {
        take(grain, nullptr, 0, 1, &ignored);
        most = std::max(most, memory_.points());
    }
    return most;
}

// The loop's length is prime, so that any stride visits every start once.
Tally SnapshotChecker::one_move(MovingMemory::Grain grain, const std::vector<std::uint32_t>& steps,
                                std::uint64_t budget) {
    Tally tally;
    const std::uint32_t points = most_points(grain);
    const std::uint32_t length = model_.length();
    const std::uint64_t all = std::uint64_t{points} * steps.size() * length;
    const auto every = static_cast<std::uint32_t>(std::max<std::uint64_t>(1, all / budget));
    for (std::uint32_t point = 0; point < points; point += every) {
        for (const std::uint32_t n : steps) {
            const MovingMemory::Move move{point, n};
            const std::uint32_t stride = n % length == 0 ? n + 1 : n;
            for (std::uint32_t i = 0; i < length; ++i) take(grain, &move, 1, stride, &tally);
        }
    }
    return tally;
}

Tally SnapshotChecker::two_moves(MovingMemory::Grain grain, const std::vector<std::uint32_t>& steps,
                                 std::uint64_t budget) {
    Tally tally;
    const std::uint64_t points = most_points(grain);
    const std::uint64_t choices = steps.size();
    const std::uint32_t length = model_.length();
    const std::uint64_t all = points * points * choices * choices * length;
    // Odd, and so in general without a common factor with any of the dimensions.
    const std::uint64_t every = std::max<std::uint64_t>(1, all / (2 * budget)) | 1;
    for (std::uint64_t at = 0; at < all; at += every) {
        std::uint64_t rest = at / length;
        const std::uint32_t a = steps[rest % choices];
        rest /= choices;
        const std::uint32_t b = steps[rest % choices];
        rest /= choices;
        const auto first = static_cast<std::uint32_t>(rest % points);
        const auto second = static_cast<std::uint32_t>(rest / points);
        if (first >= second) continue;
        const MovingMemory::Move moves[] = {{first, a}, {second, b}};
        const std::uint32_t stride = (a + b) % length == 0 ? a + b + 1 : a + b;
        take(grain, moves, 2, stride, &tally);
    }
    return tally;
}

Tally SnapshotChecker::storm(std::uint64_t seed, int most_moves, std::uint64_t count) {
    Tally tally;
    std::mt19937_64 random(seed);
    const std::uint32_t points = most_points(MovingMemory::Grain::word);
    for (std::uint64_t i = 0; i < count; ++i) {
        MovingMemory::Move moves[MovingMemory::kMaxMoves];
        const int n = 1 + static_cast<int>(random() % static_cast<std::uint64_t>(most_moves));
        for (int k = 0; k < n; ++k) {
            moves[k].point = static_cast<std::uint32_t>(random() % points);
            // Mostly a few steps, at times a whole call or span.
            const std::uint32_t most = 1u << (random() % 8);
            moves[k].steps = 1 + static_cast<std::uint32_t>(random() % most);
        }
        // An insertion sort: n is at most 6.
        for (int k = 1; k < n; ++k) {
            for (int j = k; j > 0 && moves[j].point < moves[j - 1].point; --j) {
                std::swap(moves[j], moves[j - 1]);
            }
        }
        take(MovingMemory::Grain::word, moves, n, 0, &tally);
        model_.advance(static_cast<std::uint32_t>(random() % 64));
    }
    return tally;
}

}  // namespace otel_proflink::test
