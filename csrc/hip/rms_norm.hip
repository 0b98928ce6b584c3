// SPDX-License-Identifier: Apache-2.0
#include "norm.h"

using namespace grid;

template <class T, int N>
GRID_KERNEL(1024) void rms_norm_kernel(const NormParams p) {
    normalise_row<T, N, false>(p);
}

struct RmsNormKernels {
    template <class T, int N>
    static auto get() {
        return rms_norm_kernel<T, N>;
    }
};

// scalars: eps, group
GRID_OP(rms_norm, "y", "scale", "x", "weight") {
    return launch_norm<RmsNormKernels>(args, args[0], args[1], args[2], nullptr, args[3]);
}
