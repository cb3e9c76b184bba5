// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything is hidden by default; what the two Cython modules call is marked.
#define PROFLINK_EXPORT __attribute__((visibility("default")))
