// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace cocoop_fast {

// The kernels in use: those of set_isa(), else of the environment variable COCOOP_FAST_ISA, else the widest that
// this processor executes. Throws std::invalid_argument if the variable names none that can run here.
const Kernels& kernels();

// What set_isa() takes here, from the narrowest to the widest.
std::vector<std::string> available_isas();

// Throws std::invalid_argument for a name that is not in available_isas().
void set_isa(const std::string& name);

}  // namespace cocoop_fast
