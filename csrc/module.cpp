// The Python module `groupdpo_kernels._C`: what this build is, and its switches. Importing it loads the library, which
// registers the ops (binding.cpp). It is written in Python's limited API, so that one file runs on 3.10 and every later
// version; no binding library offers that for 3.10. No torch, no mathematics.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/block.h"
#include "cpu/row.h"
#include "cpu/tail.h"
#ifdef GROUPDPO_KERNELS_CUDA_CODE
#include "cuda/ops.h"
#endif

namespace {

using namespace groupdpo_kernels;

#ifdef _OPENMP
constexpr bool openmp = true;
#else
constexpr bool openmp = false;  // threads are torch's own, through its stable parallel_for
#endif

// A new reference, as each function here returns; null with an exception set.
PyObject* cuda_architectures() {
#ifdef GROUPDPO_KERNELS_CUDA_CODE
  PyObject* names = PyUnicode_FromString(GROUPDPO_KERNELS_CUDA_CODE);
  PyObject* comma = PyUnicode_FromString(",");
  PyObject* list = names && comma ? PyUnicode_Split(names, comma, -1) : nullptr;
  PyObject* tuple = list ? PyList_AsTuple(list) : nullptr;
  Py_XDECREF(list);
  Py_XDECREF(comma);
  Py_XDECREF(names);
  return tuple;
#else
  return PyTuple_New(0);
#endif
}

PyObject* build_info(PyObject*, PyObject*) {
  // A name and a value a line.
  // clang-format off
  return Py_BuildValue("{s:s, s:s, s:s, s:s, s:N, s:s, s:s, s:N, s:(LL), s:d, s:L, s:N}",
      "version", GROUPDPO_KERNELS_VERSION,
      "torch", GROUPDPO_KERNELS_TORCH_VERSION,
      "compiler", GROUPDPO_KERNELS_COMPILER,
      "abi", "stable",
      "openmp", PyBool_FromLong(openmp),
      "cpu_capability", cpu_capability(),
      "widest_cpu_capability", widest_cpu_capability(),
      "bf16_products", PyBool_FromLong(bf16_products()),
      "block", static_cast<long long>(kMostBlockRows), static_cast<long long>(kMostBlockColumns),
      "sum_error", static_cast<double>(kSumError),
      "tail_samples", static_cast<long long>(kTailSamples),
      "cuda_architectures", cuda_architectures());
  // clang-format on
}

PyObject* use_cpu_capability(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!wanted) return nullptr;
  try {
    return PyUnicode_FromString(groupdpo_kernels::use_cpu_capability(wanted));
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* use_bf16_products(PyObject*, PyObject* on) {
  const int wanted = PyObject_IsTrue(on);
  return wanted < 0 ? nullptr : PyBool_FromLong(groupdpo_kernels::use_bf16_products(wanted != 0));
}

#ifdef GROUPDPO_KERNELS_CUDA_CODE
PyObject* cuda_error(PyObject*, PyObject* device) {
  const int64_t index = PyLong_AsLongLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  return PyUnicode_FromString(groupdpo_kernels::cuda_error(index).c_str());
}
#endif

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "Versions and compiler of this build, and what it can use on this machine."},
    {"use_cpu_capability", use_cpu_capability, METH_O,
     "Which copy of the loops over a row runs: default, avx2 or avx512; ValueError for what this processor lacks."
     " Returns the one of before. Not while another thread computes."},
    {"use_bf16_products", use_bf16_products, METH_O,
     "Whether bfloat16 is multiplied as it is (where this machine can) or widened to float32 first. Returns what was"
     " before."},
#ifdef GROUPDPO_KERNELS_CUDA_CODE
    {"cuda_error", cuda_error, METH_O, "Why the device of that index cannot run this build's code, or ''."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "C++ kernels of groupdpo_kernels: importing this module registers them with torch.",
    -1,  // its switches are the library's own, one for all interpreters
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (const char* ignored = ignored_cpu_capability()) {
    if (PyErr_WarnEx(PyExc_RuntimeWarning, ignored, 1) != 0) return nullptr;
  }
  return PyModule_Create(&module);
}
