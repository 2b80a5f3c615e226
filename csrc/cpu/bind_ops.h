#pragma once

#include <pybind11/pybind11.h>

namespace cocoop_fast {

// Adds the CPU operations to the module.
void bind_ops(pybind11::module_& m);

}  // namespace cocoop_fast
