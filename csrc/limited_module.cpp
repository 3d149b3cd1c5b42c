// The module of module.cpp once more, in Python's limited API, which pybind11 does not use: so that one wheel serves 3.10
// and every later version.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cstdint>
#include <stdexcept>

#include "build_info.h"

namespace {

using namespace groupdpo_kernels;

// New references; null with an exception set.
PyObject* to_python(const char* value) { return PyUnicode_FromString(value); }
PyObject* to_python(bool value) { return PyBool_FromLong(value); }
PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
PyObject* to_python(double value) { return PyFloat_FromDouble(value); }
PyObject* to_python(std::pair<int64_t, int64_t> pair) {
  return Py_BuildValue("(LL)", static_cast<long long>(pair.first), static_cast<long long>(pair.second));
}
PyObject* to_python(Names names) {
  if (!*names.joined) return PyTuple_New(0);
  PyObject* joined = PyUnicode_FromString(names.joined);
  PyObject* comma = PyUnicode_FromString(",");
  PyObject* list = joined && comma ? PyUnicode_Split(joined, comma, -1) : nullptr;
  PyObject* tuple = list ? PyList_AsTuple(list) : nullptr;
  Py_XDECREF(list);
  Py_XDECREF(comma);
  Py_XDECREF(joined);
  return tuple;
}

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* found = PyDict_New();
  each_build_info([&](const char* name, auto value) {
    PyObject* object = found ? to_python(value) : nullptr;
    if (found && (!object || PyDict_SetItemString(found, name, object) != 0)) {
      Py_DECREF(found);
      found = nullptr;
    }
    Py_XDECREF(object);
  });
  return found;
}

PyObject* use_cpu_capability(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!wanted) return nullptr;
  try {
    return to_python(groupdpo_kernels::use_cpu_capability(wanted));
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* use_bf16_products(PyObject*, PyObject* on) {
  const int wanted = PyObject_IsTrue(on);
  return wanted < 0 ? nullptr : to_python(groupdpo_kernels::use_bf16_products(wanted != 0));
}

#ifdef GROUPDPO_KERNELS_CUDA_CODE
PyObject* cuda_error(PyObject*, PyObject* device) {
  const int64_t index = PyLong_AsLongLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  return to_python(groupdpo_kernels::cuda_error(index).c_str());
}
#endif

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, kBuildInfoDoc},
    {"use_cpu_capability", use_cpu_capability, METH_O, kCpuCapabilityDoc},
    {"use_bf16_products", use_bf16_products, METH_O, kBf16ProductsDoc},
#ifdef GROUPDPO_KERNELS_CUDA_CODE
    {"cuda_error", cuda_error, METH_O, kCudaErrorDoc},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", kModuleDoc,
    -1,  // its switches are the library's own, one for all interpreters
    functions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (const char* ignored = ignored_cpu_capability()) {
    if (PyErr_WarnEx(PyExc_RuntimeWarning, ignored, 1) != 0) return nullptr;
  }
  return PyModule_Create(&module);
}
