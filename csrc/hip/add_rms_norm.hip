// SPDX-License-Identifier: Apache-2.0
#include "norm.h"

using namespace grid;

template <class T, int N>
GRID_KERNEL(1024) void add_rms_norm_kernel(const NormParams p) {
    normalise_row<T, N, true>(p);
}

struct AddRmsNormKernels {
    template <class T, int N>
    static auto get() {
        return add_rms_norm_kernel<T, N>;
    }
};

// scalars: eps, group
GRID_OP(add_rms_norm, "y", "scale", "x", "residual", "weight") {
    return launch_norm<AddRmsNormKernels>(args, args[0], args[1], args[2], &args[3], args[4]);
}
