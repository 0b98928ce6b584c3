// SPDX-License-Identifier: Apache-2.0
// Python's door to the kernels: opens a kernel library, hands it tensors as integers, and turns its error text into an
// exception. No torch headers, so one build serves every torch. The library runs its launches on the host, sends them to an AMD
// GPU through the machine's libamdhip64, or writes them down for somebody else to run.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "grid/abi.h"

namespace py = pybind11;

namespace {

using Entry = int (*)(const grid::Args*);

grid::Tensor read_tensor(py::handle given) {
    grid::Tensor tensor{};
    if (given.is_none()) return tensor;
    auto parts = py::reinterpret_borrow<py::tuple>(given);
    auto sizes = py::reinterpret_borrow<py::tuple>(parts[2]), strides = py::reinterpret_borrow<py::tuple>(parts[3]);
    tensor.data = reinterpret_cast<void*>(parts[0].cast<std::uint64_t>());
    tensor.type = parts[1].cast<int>();
    tensor.rank = static_cast<int>(sizes.size());
    if (tensor.rank > grid::kMaxRank) throw py::value_error("expected at most 4 dimensions, got " + std::to_string(tensor.rank));
    for (int d = 0; d < tensor.rank; ++d) {
        tensor.size[d] = sizes[d].cast<long long>();
        tensor.stride[d] = strides[d].cast<long long>();
    }
    return tensor;
}

// A launch as it was asked for: what an emulator needs to run the code object instead.
struct Recorded {
    std::string op, kernel;
    std::vector<long long> blocks;
    int threads;
    long long lds_bytes;
    py::bytes params;
};

// The few entry points of libamdhip64 that a launch needs, found at run time: nothing of ROCm is linked, so the package loads
// on machines without it.
class HipRuntime {
  public:
    explicit HipRuntime(std::string code_objects) : folder_(std::move(code_objects)) {
        void* library = dlopen("libamdhip64.so", RTLD_NOW | RTLD_LOCAL);
        for (const char* name : {"libamdhip64.so.7", "libamdhip64.so.6"})
            if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!library) throw std::runtime_error("hip: libamdhip64.so was not found; install ROCm, or a ROCm build of torch");
        find(library, "hipGetDevice", get_device_);
        find(library, "hipModuleLoad", load_);
        find(library, "hipModuleGetFunction", get_function_);
        find(library, "hipModuleLaunchKernel", launch_);
        find(library, "hipGetErrorString", text_);
    }

    static int sink(void* self, const grid::Args* args, const char* kernel, const grid::host::Launch* launch) {
        return static_cast<HipRuntime*>(self)->run(*args, kernel, *launch);
    }

  private:
    template <class Function>
    static void find(void* library, const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) throw std::runtime_error(std::string("hip: libamdhip64.so has no ") + name);
    }

    int run(const grid::Args& args, const char* kernel, const grid::host::Launch& launch) {
        int device = -1;
        if (int code = get_device_(&device)) return grid::trouble(args, "no AMD GPU can be used: %s", text_(code));
        void*& function = functions_[{launch.kernel, device}];
        if (!function) {
            void*& module = modules_[{args.op, device}];
            std::string path = folder_ + "/" + args.op + ".co";
            if (!module)
                if (int code = load_(&module, path.c_str())) return grid::trouble(args, "cannot load %s: %s", path.c_str(), text_(code));
            if (int code = get_function_(&function, module, kernel)) return grid::trouble(args, "%s is not in %s: %s", kernel, path.c_str(), text_(code));
        }
        void* params[] = {const_cast<void*>(launch.params)};
        int code = launch_(function, launch.blocks.x, launch.blocks.y, launch.blocks.z, launch.threads, 1, 1, static_cast<unsigned>(launch.lds_bytes), args.stream,
                           params, nullptr);
        return code ? grid::trouble(args, "launch failed: %s", text_(code)) : 0;
    }

    std::string folder_;
    std::map<std::pair<std::string, int>, void*> modules_;
    std::map<std::pair<const void*, int>, void*> functions_;
    int (*get_device_)(int*);
    int (*load_)(void**, const char*);
    int (*get_function_)(void**, void*, const char*);
    int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    const char* (*text_)(int);
};

class Library {
  public:
    explicit Library(const std::string& path) : path_(path), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (!handle_) throw std::runtime_error(std::string("kernels: ") + dlerror());
    }

    int wave_size() const { return symbol<int (*)()>("grid_wave_size")(); }

    void set_order(std::uint64_t seed) { symbol<void (*)(unsigned long long)>("grid_set_order")(seed); }

    void set_max_threads(int count) { max_threads_ = count; }

    void use_hip(const std::string& code_objects) {
        hip_ = std::make_unique<HipRuntime>(code_objects);
        set_sink(&HipRuntime::sink, hip_.get());
    }

    void call(const std::string& op, const py::list& tensors, const std::vector<double>& scalars, std::uint64_t stream) {
        auto found = entries_.find(op);
        if (found == entries_.end()) found = entries_.emplace(op, symbol<Entry>(("ri_" + op).c_str())).first;
        std::vector<grid::Tensor> read;
        read.reserve(tensors.size());
        for (py::handle tensor : tensors) read.push_back(read_tensor(tensor));
        char error[1024] = "";
        grid::Args args{op.c_str(),
                        read.data(),
                        scalars.data(),
                        reinterpret_cast<void*>(stream),
                        error,
                        static_cast<int>(read.size()),
                        static_cast<int>(scalars.size()),
                        static_cast<int>(sizeof(error)),
                        max_threads_};
        int code = found->second(&args);
        if (code == grid::kBadArgument) throw py::value_error(error);
        if (code) throw std::runtime_error(error);
    }

    void queue(int stream) { symbol<void (*)(int)>("grid_queue")(stream); }

    void run_queued() {
        char error[1024] = "";
        if (symbol<int (*)(char*, int)>("grid_run_queued")(error, sizeof(error))) throw std::runtime_error(error);
    }

    std::vector<Recorded> record(const std::string& op, const py::list& tensors, const std::vector<double>& scalars) {
        std::vector<Recorded> launches;
        struct Restore {
            Library* self;
            ~Restore() { self->set_sink(self->hip_ ? &HipRuntime::sink : nullptr, self->hip_.get()); }
        } restore{this};
        set_sink(&write_down, &launches);
        call(op, tensors, scalars, 0);
        return launches;
    }

  private:
    using Sink = int (*)(void*, const grid::Args*, const char*, const grid::host::Launch*);

    static int write_down(void* list, const grid::Args* args, const char* kernel, const grid::host::Launch* launch) {
        static_cast<std::vector<Recorded>*>(list)->push_back({args->op,
                                                              kernel,
                                                              {launch->blocks.x, launch->blocks.y, launch->blocks.z},
                                                              launch->threads,
                                                              launch->lds_bytes,
                                                              py::bytes(static_cast<const char*>(launch->params), launch->params_bytes)});
        return 0;
    }

    void set_sink(Sink sink, void* context) { symbol<void (*)(void*, void*)>("grid_set_sink")(reinterpret_cast<void*>(sink), context); }

    template <class Function>
    Function symbol(const char* name) const {
        void* address = dlsym(handle_, name);
        if (!address) throw std::runtime_error("kernels: " + path_ + " has no " + name + "; build it again");
        return reinterpret_cast<Function>(address);
    }

    std::string path_;
    void* handle_;
    int max_threads_ = 1024;
    std::map<std::string, Entry> entries_;
    std::unique_ptr<HipRuntime> hip_;
};

}  // namespace

PYBIND11_MODULE(_bind, module) {
    module.doc() = "Calls kernel libraries with tensors as integers.";
    py::class_<Recorded>(module, "Launch", "One kernel launch that was written down instead of run.")
        .def_readonly("op", &Recorded::op)
        .def_readonly("kernel", &Recorded::kernel, "mangled name, the symbol in the code object")
        .def_readonly("blocks", &Recorded::blocks)
        .def_readonly("threads", &Recorded::threads)
        .def_readonly("lds_bytes", &Recorded::lds_bytes, "dynamic LDS, beside what the kernel declares")
        .def_readonly("params", &Recorded::params, "the kernel's one struct argument");
    py::class_<Library>(module, "Library", "A kernel library. Tensors are (address, type code, sizes, strides) or None.")
        .def(py::init<const std::string&>(), py::arg("path"))
        .def_property_readonly("wave_size", &Library::wave_size)
        .def("set_order", &Library::set_order, py::arg("seed"), "0: natural order of threads; else another order in each launch")
        .def("set_max_threads", &Library::set_max_threads, py::arg("count"))
        .def("queue", &Library::queue, py::arg("stream"), "on the host: keep launches back in this stream; -1 runs them at once again")
        .def("run_queued", &Library::run_queued, "run the streams beside each other, as several GPUs do")
        .def("use_hip", &Library::use_hip, py::arg("code_objects"), "send launches to the current AMD GPU")
        .def("call", &Library::call, py::arg("op"), py::arg("tensors"), py::arg("scalars"), py::arg("stream"))
        .def("record", &Library::record, py::arg("op"), py::arg("tensors"), py::arg("scalars"));
}
