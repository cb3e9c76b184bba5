// SPDX-License-Identifier: Apache-2.0
//
// Runs part of a test in a forked child, for what cannot be undone in this process.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

namespace otel_proflink::test {

inline constexpr int kChildSkipped = 77;

// Expectations that fail in `body` are printed by the child and make it exit with 1; else its exit
// code is what `body` returns. A child that was killed gives 128 + the signal.
template <typename Body>
int in_child(Body body) {
    std::fflush(nullptr);
    const pid_t pid = fork();
    if (pid < 0) return -1;
    if (pid == 0) {
        const int code = body();
        std::fflush(nullptr);
        _exit(testing::Test::HasFailure() ? 1 : code);
    }
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace otel_proflink::test
