// Registration only: the module object `groupdpo_kernels._C` and the implementations of the CPU ops. No schema (ops.py has them), no maths (cpu/ has it).
#include <pybind11/pybind11.h>

namespace {

namespace py = pybind11;

py::dict build_info() {
  using namespace py::literals;
  return py::dict(
      "version"_a = GROUPDPO_KERNELS_VERSION, "torch"_a = GROUPDPO_KERNELS_TORCH_VERSION, "compiler"_a = __VERSION__, "abi"_a = "stable");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of groupdpo_kernels; importing this module registers them with torch.";
  m.def("build_info", &build_info, "What this extension was built with.");
}
