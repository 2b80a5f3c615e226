// What the bindings check of an array before a kernel may touch it. Every failure is a Python ValueError that names
// the argument. "Dense": C-contiguous. "Rows": the last dimension is contiguous, the others have any strides.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace cocoop_fast {

using Shape = std::vector<int64_t>;

// "`name` must ..., got ...": a Python ValueError.
void require(bool condition, const std::string& name, const std::string& must, const std::string& got);

std::string text_of(const Shape& shape);
Shape shape_of(const pybind11::array& array);

// `layout` is the shape in letters, for the message: "(B, M, d)".
void check_shape(const std::string& name, const pybind11::array& array, const std::string& layout,
                 const Shape& shape);

const float* dense_in(const std::string& name, const pybind11::array& array, const std::string& layout,
                      const Shape& shape);
float* dense_out(const std::string& name, pybind11::array& array, const std::string& layout, const Shape& shape);
// Integers that choose rows or classes. They are copied, and what is checked and used is the copy: a kernel runs without
// the GIL, and another thread may write to the caller's array meanwhile. Numbers in other arrays choose no address.
std::vector<int64_t> int64s(const std::string& name, const pybind11::array& array, const std::string& layout,
                            int64_t n);

// The same of integers of any width, one-dimensional, converted.
std::vector<int64_t> integers(const std::string& name, const pybind11::array& array);

struct RowCount {
    int64_t n, d;
};

// (n, d), or (groups, rows, d) with n = groups * rows; d >= 1.
RowCount count_rows(const std::string& name, const pybind11::array& array);
InRows rows_in(const std::string& name, const pybind11::array& array, RowCount expected);
OutRows rows_out(const std::string& name, pybind11::array& array, RowCount expected);

// (n, d).
Matrix<const float> matrix_in(const std::string& name, const pybind11::array& array, int64_t n, int64_t d);
Matrix<float> matrix_out(const std::string& name, pybind11::array& array, int64_t n, int64_t d);

// (B, rows, d); also, for all images alike, (1, rows, d) or (rows, d).
Part part_in(const std::string& name, const pybind11::array& array, const std::string& layout, int64_t batch,
             int64_t rows, int64_t d);
Part part_of_images(const std::string& name, const pybind11::array& array, const std::string& layout, int64_t batch,
                    int64_t rows, int64_t d);
OutPart part_out(const std::string& name, pybind11::array& array, const std::string& layout, int64_t batch,
                 int64_t rows, int64_t d);

// Threads worth starting for work that touches so many floats: OpenMP's limit, or fewer.
int threads_for(int64_t floats);

}  // namespace cocoop_fast
