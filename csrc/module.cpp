// The Python module `groupdpo_kernels._C`, by pybind11: what this build is, and its switches. Importing it loads the
// library, which registers the ops (binding.cpp). No torch, no mathematics. Wheels have limited_module.cpp instead.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_info.h"

namespace groupdpo_kernels {

namespace {

namespace py = pybind11;

template <typename Value>
py::object to_python(Value value) {
  return py::cast(value);
}

py::object to_python(std::pair<int64_t, int64_t> pair) { return py::make_tuple(pair.first, pair.second); }

py::object to_python(Names names) {
  py::list found;
  std::istringstream stream(names.joined);
  for (std::string name; std::getline(stream, name, ',');) found.append(name);
  return py::tuple(found);
}

py::dict build_info() {
  py::dict found;
  each_build_info([&](const char* name, auto value) { found[name] = to_python(value); });
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = kModuleDoc;
  if (const char* ignored = ignored_cpu_capability()) {
    if (PyErr_WarnEx(PyExc_RuntimeWarning, ignored, 1) != 0) throw py::error_already_set();
  }
  m.def("build_info", &build_info, kBuildInfoDoc);
  m.def("use_cpu_capability", &use_cpu_capability, py::arg("name"), py::pos_only(), kCpuCapabilityDoc);
  m.def("use_bf16_products", &use_bf16_products, py::arg("on"), py::pos_only(), kBf16ProductsDoc);
#ifdef GROUPDPO_KERNELS_CUDA_CODE
  m.def("cuda_error", &cuda_error, py::arg("device"), py::pos_only(), kCudaErrorDoc);
#endif
}

}  // namespace groupdpo_kernels
