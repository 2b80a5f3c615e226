// Frozen linear layers: out = x W^T forward, dx = dy W backward, with what follows them done while a result is still
// in the cache nearest to the core.
//
// Tiles of kTileRows x kTileColumns results stay in registers over a whole block of the sum. Rows of x are read where
// they lie; W is read in packed panels (forward), or where it lies (backward, which needs no transposition). An
// element's products are added in ascending order whatever the tiling: the bits depend neither on the threads nor on
// the other rows.
#pragma once

namespace cocoop_fast {
namespace {

// With two vectors a row, a tile takes all but a few registers. On x86 a factor from x is loaded into all lanes of a
// register, one at a time. NEON multiplies by a lane of a register, so four factors of each row are loaded at once: 18
// sums (four units with a latency of four cycles keep 16 underway), 9 vectors of factors and 2 of W, of 32 registers.
#if defined(COCOOP_FAST_NEON)
constexpr int kTileRows = 9, kFactors = 4;
#else
constexpr int kTileRows = kLanes == 16 ? 14 : 6, kFactors = 1;
#endif
constexpr int kTileColumns = 2 * kLanes;
constexpr int kRowsAhead = 12;  // of W: where it is not packed its rows are far apart, and no hardware foresees them
static_assert(kPanelColumns % kTileColumns == 0, "a panel is a whole number of tiles");

template <class Float>
inline Float* row_of(const Matrix<Float>& matrix, int64_t r) {
    return matrix.data + r * matrix.stride;
}

// The two vectors of a tile's row: all lanes, or those of the columns that are left.
struct WholeTile {
    AllLanes first, second;
    explicit WholeTile(int64_t) {}
};
struct PartTile {
    FirstLanes first, second;
    explicit PartTile(int64_t columns)
        : first{columns < kLanes ? columns : kLanes}, second{columns > kLanes ? columns - kLanes : 0} {}
};

// acc += x[.., k : k + count] b[k : k + count, ..]
template <int rows, int count, class Columns>
inline void multiply_columns(int64_t k, const float* x, int64_t x_stride, const float* b, int64_t b_stride,
                             Vec (&acc)[rows][2], Columns columns) {
    Vec factors[rows];
    if constexpr (count == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) factors[r] = load(x + r * x_stride + k);
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        const float* b_row = b + (k + i) * b_stride;
        const Vec b0 = columns.first.load(b_row);
        const Vec b1 = columns.second.load(b_row + kLanes);
        __builtin_prefetch(b_row + kRowsAhead * b_stride);
        if (kLanes > 4) __builtin_prefetch(b_row + kRowsAhead * b_stride + kLanes);  // it may be another cache line
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const Vec factor = broadcast(count == kLanes ? factors[r][i] : x[r * x_stride + k + i]);
            acc[r][0] += factor * b0;
            acc[r][1] += factor * b1;
        }
    }
}

// tile = (sum so far) + x[.., begin:end] b[begin:end, ..]
template <int rows, class Columns>
void multiply(int64_t begin, int64_t end, const float* x, int64_t x_stride, const float* b, int64_t b_stride,
              const float* sum_so_far, int64_t sum_stride, float* tile, int64_t tile_stride, Columns columns) {
    Vec acc[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        acc[r][0] = begin ? columns.first.load(sum_so_far + r * sum_stride) : Vec{};
        acc[r][1] = begin ? columns.second.load(sum_so_far + r * sum_stride + kLanes) : Vec{};
    }
    int64_t k = begin;
    for (; k + kFactors <= end; k += kFactors) {
        multiply_columns<rows, kFactors>(k, x, x_stride, b, b_stride, acc, columns);
    }
    if constexpr (kFactors > 1) {
        for (; k < end; k++) multiply_columns<rows, 1>(k, x, x_stride, b, b_stride, acc, columns);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        columns.first.store(tile + r * tile_stride, acc[r][0]);
        columns.second.store(tile + r * tile_stride + kLanes, acc[r][1]);
    }
}

template <int rows, class Columns, class... Args>
inline void multiply_rows(int64_t n, Args... args) {
    if (n == rows) {
        multiply<rows, Columns>(args...);
    } else if constexpr (rows > 1) {
        multiply_rows<rows - 1, Columns>(n, args...);
    }
}

// What becomes of z, a finished product at row r, column i.
struct Plain {
    template <class Lanes>
    static void finish(const Linear& a, int64_t r, int64_t i, Vec z, Lanes lanes) {
        if (a.bias != nullptr) z += lanes.load(a.bias + i);
        if (a.residual.data != nullptr) z += lanes.load(row_of(a.residual, r) + i);
        lanes.store(row_of(a.out, r) + i, z);
    }
};

// u = z + bias, out = act(u)
template <class Act>
struct Activated {
    template <class Lanes>
    static void finish(const Linear& a, int64_t r, int64_t i, Vec z, Lanes lanes) {
        const Vec u = z + lanes.load(a.bias + i);
        if (a.u.data != nullptr) lanes.store(row_of(a.u, r) + i, u);
        lanes.store(row_of(a.out, r) + i, Act::value(u));
    }
};

// out = z act'(u)
template <class Act>
struct Differentiated {
    template <class Lanes>
    static void finish(const Linear& a, int64_t r, int64_t i, Vec z, Lanes lanes) {
        lanes.store(row_of(a.out, r) + i, z * Act::derivative(lanes.load(row_of(a.u, r) + i)));
    }
};

template <class Finish, class Columns>
void compute_tile(const Linear& a, int64_t row, int64_t rows, int64_t column, int64_t begin, int64_t end) {
    const Columns columns(a.width - column);
    const float* b = a.weight + column / kPanelColumns * a.panel_stride + column % kPanelColumns;
    float* out = row_of(a.out, row) + column;
    const int64_t out_stride = a.out.stride;
    const auto multiply_into = [&](float* tile, int64_t stride) {
        multiply_rows<kTileRows, Columns>(rows, begin, end, row_of(a.x, row), a.x.stride, b, a.weight_stride,
                                          (const float*)out, out_stride, tile, stride, columns);
    };
    if (end < a.k) return multiply_into(out, out_stride);
    alignas(64) float tile[kTileRows * kTileColumns];  // not `out`: the residual may lie there
    multiply_into(tile, kTileColumns);
    for (int64_t r = 0; r < rows; r++) {
        const float* z = tile + r * kTileColumns;
        Finish::finish(a, row + r, column, columns.first.load(z), columns.first);
        Finish::finish(a, row + r, column + kLanes, columns.second.load(z + kLanes), columns.second);
    }
}

// All rows of one panel of columns.
template <class Finish>
void compute_panel(const Linear& a, int64_t panel, int64_t first_row, int64_t last_row) {
    const int64_t panel_end = (panel + 1) * kPanelColumns;
    const int64_t last_column = panel_end < a.width ? panel_end : a.width;
    const int64_t rows = last_row - first_row, blocks = (rows + kTileRows - 1) / kTileRows;
    for (int64_t begin = 0; begin < a.k; begin += a.k_block) {
        const int64_t end = begin + a.k_block < a.k ? begin + a.k_block : a.k;
        for (int64_t block = 0; block < blocks; block++) {  // nearly equal blocks: no small one is left over
            const int64_t row = first_row + rows * block / blocks;
            const int64_t next = first_row + rows * (block + 1) / blocks;
            for (int64_t column = panel * kPanelColumns; column < last_column; column += kTileColumns) {
                if (column + kTileColumns <= a.width) {
                    compute_tile<Finish, WholeTile>(a, row, next - row, column, begin, end);
                } else {
                    compute_tile<Finish, PartTile>(a, row, next - row, column, begin, end);
                }
            }
        }
    }
}

// A task is a panel of columns, so that each core reads its own share of W once; where there are not enough panels
// for all threads, also a chunk of the rows.
template <class Finish>
void compute(const Linear& a) {
    const int64_t panels = (a.width + kPanelColumns - 1) / kPanelColumns;
    const int64_t blocks = (a.n + kTileRows - 1) / kTileRows;
    const int64_t wanted = panels % a.threads == 0 ? 1 : (4 * a.threads + panels - 1) / panels;
    const int64_t chunks = wanted < blocks ? wanted : blocks;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t task = 0; task < panels * chunks; task++) {
        const int64_t chunk = task % chunks;
        compute_panel<Finish>(a, task / chunks, a.n * chunk / chunks, a.n * (chunk + 1) / chunks);
    }
}

template <class Act>
void compute_with(const Linear& a) {
    a.finish == LinearFinish::activation ? compute<Activated<Act>>(a) : compute<Differentiated<Act>>(a);
}

void linear(const Linear& a) {
    if (a.finish == LinearFinish::plain) return compute<Plain>(a);
    a.kind == Activation::gelu ? compute_with<Gelu>(a) : compute_with<QuickGelu>(a);
}

// packed[panel][i][c] = weight[panel * kPanelColumns + c][i]; columns beyond the last are zero.
void pack_weight(const PackWeight& a) {
    const int64_t panels = (a.width + kPanelColumns - 1) / kPanelColumns;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        float* to = a.packed + panel * a.k * kPanelColumns;
        for (int64_t c = 0; c < kPanelColumns; c++) {
            const int64_t column = panel * kPanelColumns + c;
            const float* from = a.weight + column * a.weight_stride;
            for (int64_t i = 0; i < a.k; i++) to[i * kPanelColumns + c] = column < a.width ? from[i] : 0.0f;
        }
    }
}

}  // namespace
}  // namespace cocoop_fast
