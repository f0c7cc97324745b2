// mlpext._cutlass: a module with nothing but the table, for mlpext._C. No torch header.
#include <Python.h>

#include "launchers.h"

PyMODINIT_FUNC PyInit__cutlass() {
  using namespace mlpext::cuda::ct;
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_cutlass", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  static Table table{{bfloat16_forward, float16_forward}, {bfloat16_input_gradient, float16_input_gradient}};
  PyObject* const module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyObject* const capsule = PyCapsule_New(&table, "mlpext._cutlass.table", nullptr);
  if (PyModule_AddObject(module, "table", capsule) == 0) return module;
  Py_XDECREF(capsule);
  Py_DECREF(module);
  return nullptr;
}
