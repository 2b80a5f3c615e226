#include "cpu/arrays.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace py = pybind11;

namespace cocoop_fast {

void require(bool condition, const std::string& name, const std::string& must, const std::string& got) {
    if (!condition) throw py::value_error("`" + name + "` must " + must + ", got " + got);
}

std::string text_of(const Shape& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

Shape shape_of(const py::array& array) { return Shape(array.shape(), array.shape() + array.ndim()); }

// Numpy takes microseconds to spell a dtype, so only for the message: every array of every call is checked.
static void require_dtype(bool condition, const std::string& name, const std::string& must, const py::array& array) {
    if (!condition) require(false, name, must, py::str(py::object(array.dtype())));
}

void check_shape(const std::string& name, const py::array& array, const std::string& layout, const Shape& shape) {
    const Shape got = shape_of(array);
    require(got == shape, name, "have shape " + layout + " = " + text_of(shape), text_of(got));
}

static void check_float32(const std::string& name, const py::array& array) {
    require_dtype(py::isinstance<py::array_t<float>>(array), name, "be float32", array);
}

static void check_writeable(const std::string& name, const py::array& array) {
    require(array.writeable(), name, "be writeable", "a read-only array");
}

static void check_dense(const std::string& name, const py::array& array) {
    require(array.flags() & py::array::c_style, name, "be contiguous", "strides of " + [&] {
        return text_of(Shape(array.strides(), array.strides() + array.ndim())) + " bytes";
    }());
}

static void check_aligned(const std::string& name, const py::array& array) {
    const auto address = reinterpret_cast<uintptr_t>(array.data());
    require(array.size() == 0 || address % alignof(float) == 0, name, "be aligned", "an odd address");
}

const float* dense_in(const std::string& name, const py::array& array, const std::string& layout, const Shape& shape) {
    check_float32(name, array);
    check_shape(name, array, layout, shape);
    check_dense(name, array);
    check_aligned(name, array);
    return static_cast<const float*>(array.data());
}

float* dense_out(const std::string& name, py::array& array, const std::string& layout, const Shape& shape) {
    const float* data = dense_in(name, array, layout, shape);
    check_writeable(name, array);
    return const_cast<float*>(data);
}

// Byte by byte, so from any address.
static std::vector<int64_t> copy_of(const py::array& dense) {
    std::vector<int64_t> copy(dense.size());
    if (!copy.empty()) std::memcpy(copy.data(), dense.data(), copy.size() * sizeof(int64_t));
    return copy;
}

std::vector<int64_t> int64s(const std::string& name, const py::array& array, const std::string& layout, int64_t n) {
    require_dtype(py::isinstance<py::array_t<int64_t>>(array), name, "be int64", array);
    check_shape(name, array, layout, {n});
    check_dense(name, array);
    return copy_of(array);
}

std::vector<int64_t> integers(const std::string& name, const py::array& array) {
    const char kind = array.dtype().kind();
    require_dtype(kind == 'i' || kind == 'u', name, "be integers", array);
    require(array.ndim() == 1, name, "have one dimension", text_of(shape_of(array)));
    const auto converted = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    if (!converted) throw py::error_already_set();
    return copy_of(converted);
}

// Strides in floats, of an array whose last dimension is contiguous.
static std::vector<int64_t> row_strides(const std::string& name, const py::array& array) {
    check_float32(name, array);
    const int last = (int)array.ndim() - 1;
    if (array.size() == 0) return std::vector<int64_t>(last, 0);
    require(array.shape(last) <= 1 || array.strides(last) == (py::ssize_t)sizeof(float), name,
            "be contiguous in its last dimension", "a stride of " + std::to_string(array.strides(last)) + " bytes");
    std::vector<int64_t> strides;
    for (int i = 0; i < last; i++) {
        const int64_t bytes = array.shape(i) > 1 ? array.strides(i) : 0;  // the stride of a single element is arbitrary
        require(bytes % (int64_t)sizeof(float) == 0, name, "have strides of whole floats",
                std::to_string(bytes) + " bytes");
        strides.push_back(bytes / (int64_t)sizeof(float));
    }
    check_aligned(name, array);
    return strides;
}

// Threads write to different rows, so no two rows of a result may share memory.
static void check_disjoint(const std::string& name, const py::array& array, const std::vector<int64_t>& strides) {
    check_writeable(name, array);
    std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
    for (size_t i = 0; i < strides.size(); i++) {
        if (array.shape(i) == 0) return;
        if (array.shape(i) > 1) dimensions.emplace_back(std::abs(strides[i]), array.shape(i));
    }
    std::sort(dimensions.begin(), dimensions.end());
    int64_t extent = array.shape(array.ndim() - 1);
    for (const auto& [stride, size] : dimensions) {
        require(stride >= extent, name, "have rows that do not overlap", "a stride of " + std::to_string(stride) +
                                                                             " floats over " + std::to_string(extent));
        extent += stride * (size - 1);
    }
}

RowCount count_rows(const std::string& name, const py::array& array) {
    require(array.ndim() == 2 || array.ndim() == 3, name, "have shape (n, d) or (B, n, d)", text_of(shape_of(array)));
    const int last = (int)array.ndim() - 1;
    require(array.shape(last) >= 1, name, "have rows of at least one number", text_of(shape_of(array)));
    return {last == 1 ? array.shape(0) : array.shape(0) * array.shape(1), array.shape(last)};
}

static void check_rows(const std::string& name, const py::array& array, RowCount expected) {
    const RowCount got = count_rows(name, array);
    require(got.n == expected.n && got.d == expected.d, name,
            "have " + std::to_string(expected.n) + " rows of " + std::to_string(expected.d),
            text_of(shape_of(array)));
}

template <class Float>
static Rows<Float> as_rows(const py::array& array, const std::vector<int64_t>& strides) {
    Float* data = static_cast<Float*>(const_cast<void*>(array.data()));
    if (strides.size() == 1) return {data, std::max<int64_t>(array.shape(0), 1), 0, strides[0]};
    return {data, std::max<int64_t>(array.shape(1), 1), strides[0], strides[1]};
}

InRows rows_in(const std::string& name, const py::array& array, RowCount expected) {
    check_rows(name, array, expected);
    return as_rows<const float>(array, row_strides(name, array));
}

OutRows rows_out(const std::string& name, py::array& array, RowCount expected) {
    check_rows(name, array, expected);
    const std::vector<int64_t> strides = row_strides(name, array);
    check_disjoint(name, array, strides);
    return as_rows<float>(array, strides);
}

Matrix<const float> matrix_in(const std::string& name, const py::array& array, int64_t n, int64_t d) {
    require(shape_of(array) == Shape{n, d}, name, "have shape " + text_of({n, d}), text_of(shape_of(array)));
    return {static_cast<const float*>(array.data()), row_strides(name, array)[0]};
}

Matrix<float> matrix_out(const std::string& name, py::array& array, int64_t n, int64_t d) {
    const Matrix<const float> matrix = matrix_in(name, array, n, d);
    check_disjoint(name, array, {matrix.stride});
    return {const_cast<float*>(matrix.data), matrix.stride};
}

Part part_in(const std::string& name, const py::array& array, const std::string& layout, int64_t batch, int64_t rows,
             int64_t d) {
    if (array.ndim() == 2) {
        check_shape(name, array, layout, {rows, d});
        return {static_cast<const float*>(array.data()), 0, row_strides(name, array)[0]};
    }
    if (array.ndim() == 3 && array.shape(0) == 1) batch = 1;
    return part_of_images(name, array, layout, batch, rows, d);
}

Part part_of_images(const std::string& name, const py::array& array, const std::string& layout, int64_t batch,
                    int64_t rows, int64_t d) {
    check_shape(name, array, layout, {batch, rows, d});
    const std::vector<int64_t> strides = row_strides(name, array);
    return {static_cast<const float*>(array.data()), strides[0], strides[1]};
}

OutPart part_out(const std::string& name, py::array& array, const std::string& layout, int64_t batch, int64_t rows,
                 int64_t d) {
    const Part part = part_of_images(name, array, layout, batch, rows, d);
    check_disjoint(name, array, {part.image_stride, part.row_stride});
    return {const_cast<float*>(part.data), part.image_stride, part.row_stride};
}

int threads_for(int64_t floats) {
#ifdef _OPENMP
    constexpr int64_t worth_a_thread = 1 << 14;  // a few microseconds: what it costs to start one
    return (int)std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), floats / worth_a_thread));
#else
    (void)floats;
    return 1;
#endif
}

}  // namespace cocoop_fast
