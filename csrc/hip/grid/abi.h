// SPDX-License-Identifier: Apache-2.0
// The border between Python and the kernels: one C function per op, `int ri_<op>(const grid::Args*)`, non-zero with a text in
// args->error when it refuses. Tensors come in the order outputs, scratch, inputs; scalars in the order of the contract.
#pragma once

#include "grid.h"

extern "C" int snprintf(char*, __SIZE_TYPE__, const char*, ...) noexcept;

namespace grid {

constexpr int kMaxRank = 4;

struct Tensor {
    void* data;
    i64 size[kMaxRank], stride[kMaxRank];
    int type, rank;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    // An absent optional tensor has no dimensions; the address of an empty one may be null.
    explicit operator bool() const { return rank > 0; }
};

struct Args {
    const char* op;
    const Tensor* tensors;
    const double* scalars;
    void* stream;
    char* error;
    int num_tensors, num_scalars, error_size, max_threads;

    const Tensor& operator[](int index) const { return tensors[index]; }
    float real(int index) const { return static_cast<float>(scalars[index]); }
    i64 integer(int index) const { return static_cast<i64>(scalars[index]); }
};

// Blocks of a launch; zero of them launch nothing.
struct Blocks {
    i64 x, y = 1, z = 1;
};

// What an entry returns beside 0, with the text set.
constexpr int kBadArgument = 1, kTrouble = 2;

template <class... Values>
int write_error(const Args& args, int code, const char* format, Values... values) {
    int used = snprintf(args.error, args.error_size, "%s: ", args.op);
    snprintf(args.error + used, args.error_size - used, format, values...);
    return code;
}

inline int fail(const Args& args, const char* text) { return write_error(args, kBadArgument, "%s", text); }

template <class... Values>
int fail(const Args& args, const char* format, Values... values) {
    return write_error(args, kBadArgument, format, values...);
}

// The device, or the kernel itself, is at fault.
inline int trouble(const Args& args, const char* text) { return write_error(args, kTrouble, "%s", text); }

template <class... Values>
int trouble(const Args& args, const char* format, Values... values) {
    return write_error(args, kTrouble, format, values...);
}

inline int item_size(int type) {
    constexpr int sizes[] = {2, 2, 4, 4, 8, 1, 1, 1};
    return sizes[type];
}

inline bool is_fp8(const Tensor& tensor) { return tensor.type == kFp8Fn || tensor.type == kFp8Fnuz; }

// Every launch computes 64-bit addresses from strides, so rows may lie anywhere; elements of a row must be neighbours.
inline int check_layout(const Args& args, const char* const* names) {
    for (int i = 0; i < args.num_tensors; ++i) {
        const Tensor& t = args[i];
        if (!t) continue;
        int last = t.rank - 1;
        if (t.size[last] > 1 && t.stride[last] != 1)
            return fail(args, "%s: expected neighbouring elements in the last dimension (stride 1), got stride %lld; pass .contiguous()",
                        names[i], t.stride[last]);
        if (reinterpret_cast<u64>(t.data) % item_size(t.type))
            return fail(args, "%s: expected an address that is a multiple of %d, got %p", names[i], item_size(t.type), t.data);
    }
    return 0;
}

// Whether rows of `width` elements that start `strides` apart can be read in vectors of `bytes`.
inline bool aligned(const Tensor& t, i64 width, int bytes) {
    if (!t) return true;
    int item = item_size(t.type);
    bool yes = reinterpret_cast<u64>(t.data) % bytes == 0 && width * item % bytes == 0;
    for (int d = 0; d + 1 < t.rank; ++d) yes = yes && (t.size[d] <= 1 || t.stride[d] * item % bytes == 0);
    return yes;
}

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Calls `body` with a value of the tensor's element type.
template <class Body>
int by_float_type(const Args& args, const Tensor& t, Body body) {
    switch (t.type) {
        case kBf16: return body(bf16{});
        case kF16: return body(f16{});
        case kF32: return body(0.0f);
        default: return fail(args, "expected bfloat16, float16 or float32, got type code %d", t.type);
    }
}

// A compile-time number, for bodies that take their vector width as an argument.
template <int N>
struct Const {
    static constexpr int value = N;
};

// Calls `body` with the elements of a 16-byte vector of T if everything is aligned to 16 bytes, else with 1.
template <class T, class Body>
int by_vector_width(bool aligned, Body body) {
    return aligned ? body(Const<16 / sizeof(T)>{}) : body(Const<1>{});
}

// As many threads as there is work for, in whole waves of 64 so that the choice suits every chip.
inline int threads_for(const Args& args, i64 work, int most) {
    i64 limit = most < args.max_threads ? most : args.max_threads;
    i64 wanted = ceil_div(work > 0 ? work : 1, 64) * 64;
    return static_cast<int>(wanted < limit ? wanted : limit);
}

#if defined(__HIP__) || defined(__HIPCC__)

// Device code only: the host half of every launch lives in the library that a plain C++ compiler made of the same file.
template <class Params>
int launch(const Args& args, void (*kernel)(Params), Blocks blocks, int threads, const Params& params, i64 lds_bytes = 0);

#elif defined(__CUDACC__)

template <class Params>
int launch(const Args& args, void (*kernel)(Params), Blocks blocks, int threads, const Params& params, i64 lds_bytes = 0) {
    if (blocks.x * blocks.y * blocks.z == 0) return 0;
    if (lds_bytes > 48 * 1024)
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(lds_bytes));
    kernel<<<dim3(blocks.x, blocks.y, blocks.z), threads, lds_bytes, static_cast<cudaStream_t>(args.stream)>>>(params);
    cudaError_t code = cudaGetLastError();
    return code == cudaSuccess ? 0 : trouble(args, "launch failed: %s", cudaGetErrorString(code));
}

#else

namespace host {

struct Launch {
    void (*call)(const void* kernel, const void* params);
    const void* kernel;
    const void* params;
    i64 params_bytes, lds_bytes;
    Blocks blocks;
    int threads;
};

int launch(const Args& args, const Launch& launch);

}  // namespace host

template <class Params>
int launch(const Args& args, void (*kernel)(Params), Blocks blocks, int threads, const Params& params, i64 lds_bytes = 0) {
    auto call = [](const void* address, const void* given) {
        reinterpret_cast<void (*)(Params)>(const_cast<void*>(address))(*static_cast<const Params*>(given));
    };
    const void* address = reinterpret_cast<const void*>(kernel);
    return host::launch(args, {call, address, &params, sizeof(Params), lds_bytes, blocks, threads});
}

#endif

}  // namespace grid

// The entry of an op: GRID_OP(name, "output", ..., "input", ...) { ...; return launch(args, ...); }
#define GRID_OP(name, ...)                                                                                         \
    static int name##_launch(const grid::Args& args);                                                              \
    static const char* const name##_tensors[] = {__VA_ARGS__};                                                     \
    extern "C" __attribute__((visibility("default"))) int ri_##name(const grid::Args* given) {                     \
        grid::Args args = *given;                                                                                  \
        args.op = #name;                                                                                           \
        constexpr int expected = sizeof(name##_tensors) / sizeof(name##_tensors[0]);                               \
        if (args.num_tensors != expected)                                                                          \
            return grid::fail(args, "expected %d tensors, got %d", expected, args.num_tensors);                    \
        if (int refused = grid::check_layout(args, name##_tensors)) return refused;                                \
        return name##_launch(args);                                                                                \
    }                                                                                                              \
    static int name##_launch(const grid::Args& args)
