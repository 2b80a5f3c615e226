// Frozen linear layers: out = x W^T forward, dx = dy W backward, with what follows them done while a result is still
// in the cache nearest to the core.
//
// Tiles of kTileRows x kTileColumns results stay in registers over a whole block of the sum. Rows of x are read where
// they lie; W is read in packed panels (forward), or, in backward, which needs no transposition, where it lies or from
// copies of a thread's own. An element's products are added in ascending order whatever the tiling: the bits depend
// neither on the threads nor on the other rows.
#pragma once

namespace cocoop_fast {
namespace {

// With two vectors a row, a tile takes all but a few registers. On x86 a factor from x is loaded into all lanes of a
// register, one at a time. NEON multiplies by a lane of a register, so four factors of each row are loaded at once: 18
// sums (four units with a latency of four cycles keep 16 underway), 9 vectors of factors and 2 of W, of 32 registers.
#if defined(COCOOP_FAST_NEON)
constexpr int kTileRows = 9;
constexpr bool kLoadsFactors = true;
#else
constexpr int kTileRows = kLanes == 16 ? 14 : 6;
constexpr bool kLoadsFactors = false;
#endif
constexpr int kUnrolled = 4;  // columns of x in one round of the innermost loop
constexpr int kTileColumns = 2 * kLanes;
constexpr int kRowsAhead = 12;  // of W: where it is not packed its rows are far apart, and no hardware foresees them
constexpr int kRowsAheadOfCopy = 16;
constexpr int kCacheLine = 16;  // floats
// Tiles of rows for which it is worthwhile to copy a panel of W first: where all its rows begin in one set of the first
// cache, and elsewhere.
constexpr int kTilesWorthACopy[] = {4, 24};
constexpr int64_t kFloatsOfAWay = 1024;  // of the first cache: what lies so far apart shares a set
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

// The factors from `rows` rows of x, from column 0 on.
//
// x86 has not the registers for a pointer to each row, but an address may be a pointer plus 1, 2, 4 times an offset: one
// pointer serves five rows, with an offset of one row's length and another of three. `opaque` keeps the compiler from
// computing the pointers to all rows in advance, which it would have to keep in memory.
template <int rows>
class FactorRows {
public:
    FactorRows(const float* x, int64_t stride) : one_(stride), three_(3 * stride) {
        for (int i = 0; i < kPointers; i++) pointers_[i] = x + i * kRowsOfPointer * stride;
        opaque(one_);
        opaque(three_);
    }
    // Before the factors of a column are asked for.
    void settle() {
#pragma GCC unroll 4
        for (auto& pointer : pointers_) opaque(pointer);
    }
    const float* at(int r) const {
        const float* pointer = pointers_[r / kRowsOfPointer];
        const int offset = r % kRowsOfPointer;
        return offset == 3 ? pointer + three_ : pointer + offset * one_;
    }
    void advance(int count) {
#pragma GCC unroll 4
        for (auto& pointer : pointers_) pointer += count;
    }

private:
    static constexpr int kRowsOfPointer = 5, kPointers = (rows + kRowsOfPointer - 1) / kRowsOfPointer;
    template <class Value>
    static void opaque(Value& value) {
        asm("" : "+r"(value));
    }
    const float* pointers_[kPointers];
    int64_t one_, three_;
};

// Rows of the panel that comes next, brought nearer on the way: one in each round of the innermost loop.
struct Ahead {
    const float* row;
    int64_t stride;
};

// acc += x[.., 0 : count] b[0 : count, ..]
template <int rows, int count, class Columns>
inline void multiply_columns(const FactorRows<rows>& x, const float* b, int64_t b_stride, Vec (&acc)[rows][2],
                             Columns columns) {
    Vec factors[rows];
    constexpr bool loaded = kLoadsFactors && count == kLanes;
    if constexpr (loaded) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) factors[r] = load(x.at(r));
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        const float* b_row = b + i * b_stride;
        const Vec b0 = columns.first.load(b_row);
        const Vec b1 = columns.second.load(b_row + kLanes);
        for (int c = 0; c < kTileColumns; c += kCacheLine) __builtin_prefetch(b_row + kRowsAhead * b_stride + c);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const Vec factor = broadcast(loaded ? factors[r][i] : x.at(r)[i]);
            acc[r][0] += factor * b0;
            acc[r][1] += factor * b1;
        }
    }
}

// tile = (sum so far) + x[.., 0:k] b[0:k, ..], the sum so far being 0 if null
template <int rows, class Columns>
void multiply(int64_t k, const float* x, int64_t x_stride, const float* b, int64_t b_stride, const float* sum_so_far,
              int64_t sum_stride, float* tile, int64_t tile_stride, Ahead ahead, Columns columns) {
    Vec acc[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        acc[r][0] = sum_so_far ? columns.first.load(sum_so_far + r * sum_stride) : Vec{};
        acc[r][1] = sum_so_far ? columns.second.load(sum_so_far + r * sum_stride + kLanes) : Vec{};
    }
    FactorRows<rows> factors(x, x_stride);
    int64_t i = 0;
    for (; i + kUnrolled <= k; i += kUnrolled, b += kUnrolled * b_stride) {
        for (int64_t c = 0; c < kPanelColumns; c += kCacheLine) __builtin_prefetch(ahead.row + c, 0, 2);
        ahead.row += ahead.stride;
        factors.settle();
        multiply_columns<rows, kUnrolled>(factors, b, b_stride, acc, columns);
        factors.advance(kUnrolled);
    }
    for (; i < k; i++, b += b_stride) {
        multiply_columns<rows, 1>(factors, b, b_stride, acc, columns);
        factors.advance(1);
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

// u = z + bias, out = act(u). Nobody reads u before backward has come back to this layer.
template <class Act>
struct Activated {
    template <class Lanes>
    static void finish(const Linear& a, int64_t r, int64_t i, Vec z, Lanes lanes) {
        const Vec u = z + lanes.load(a.bias + i);
        if (a.u.data != nullptr) lanes.store_far(row_of(a.u, r) + i, u);
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

// The rows begin .. end of what x is multiplied by, at a panel's columns: packed, where they lie, or copied.
struct Block {
    int64_t begin, end;
    const float* b;
    int64_t stride;
    Ahead ahead;
};

// What a tile is finished with is further away than what it is computed from.
template <class Float>
inline void prefetch_rows(const Matrix<Float>& matrix, int64_t row, int64_t rows, int64_t column) {
    for (int64_t r = row; r < row + rows; r++) {
        for (int64_t c = 0; c < kTileColumns; c += kCacheLine) __builtin_prefetch(row_of(matrix, r) + column + c);
    }
}

template <class Finish, class Columns>
void compute_tile(const Linear& a, int64_t row, int64_t rows, int64_t column, const Block& block) {
    const Columns columns(a.width - column);
    const float* b = block.b + column % kPanelColumns;
    float* out = row_of(a.out, row) + column;
    const int64_t out_stride = a.out.stride;
    prefetch_rows(a.out, row, rows, column);
    if (a.residual.data != nullptr) prefetch_rows(a.residual, row, rows, column);
    if (a.finish == LinearFinish::activation_gradient) prefetch_rows(a.u, row, rows, column);
    const auto multiply_into = [&](float* tile, int64_t stride) {
        multiply_rows<kTileRows, Columns>(rows, block.end - block.begin, row_of(a.x, row) + block.begin, a.x.stride, b,
                                          block.stride, block.begin ? (const float*)out : nullptr, out_stride, tile,
                                          stride, block.ahead, columns);
    };
    if (block.end < a.k) return multiply_into(out, out_stride);
    alignas(64) float tile[kTileRows * kTileColumns];  // not `out`: the residual may lie there
    multiply_into(tile, kTileColumns);
    for (int64_t r = 0; r < rows; r++) {
        const float* z = tile + r * kTileColumns;
        Finish::finish(a, row + r, column, columns.first.load(z), columns.first);
        Finish::finish(a, row + r, column + kLanes, columns.second.load(z + kLanes), columns.second);
    }
}

// A panel's rows begin .. end of W side by side, as in a packed weight.
void copy_panel(const Linear& a, const float* from, int64_t count, int64_t columns, float* to) {
    for (int64_t i = 0; i < count; i++, from += a.weight_stride, to += kPanelColumns) {
        for (int64_t c = 0; c < kPanelColumns; c += kCacheLine) {
            __builtin_prefetch(from + kRowsAheadOfCopy * a.weight_stride + c);
        }
        if (columns == kPanelColumns) {
            for (int64_t c = 0; c < kPanelColumns; c += kLanes) store(to + c, load(from + c));
        } else {
            for (int64_t c = 0; c < columns; c++) to[c] = from[c];
        }
    }
}

// All rows of one panel of columns.
//
// Where W is not packed, its rows at these columns are pages apart: each 128 bytes are of another page, and many rows
// share few sets of the first cache. So they are copied side by side, once for all rows of x if those are many.
template <class Finish>
void compute_panel(const Linear& a, int64_t panel, int64_t first_row, int64_t last_row, float* copy) {
    const int64_t column = panel * kPanelColumns;
    const int64_t last_column = column + kPanelColumns < a.width ? column + kPanelColumns : a.width;
    const int64_t rows = last_row - first_row, tiles = (rows + kTileRows - 1) / kTileRows;
    const bool copies = copy != nullptr && tiles >= kTilesWorthACopy[a.weight_stride % kFloatsOfAWay != 0];
    const int64_t at_once = copies ? a.copied_rows : a.k_block;
    for (int64_t begin = 0; begin < a.k; begin += at_once) {
        const int64_t end = begin + at_once < a.k ? begin + at_once : a.k;
        const float* b = a.weight + panel * a.panel_stride + begin * a.weight_stride;
        const bool last = column + kPanelColumns >= a.width;
        Block block{begin, end, b, a.weight_stride, {}};
        if (copies) {
            copy_panel(a, b, end - begin, last_column - column, copy);
            block.b = copy;
            block.stride = kPanelColumns;
        }
        for (int64_t i = 0; i < tiles; i++) {  // nearly equal numbers of rows: no small one is left over
            const int64_t row = first_row + rows * i / tiles, next = first_row + rows * (i + 1) / tiles;
            // A quarter of the next panel's rows in each of the first four tiles.
            block.ahead = {b, 0};
            if (i < kUnrolled && !last) {
                block.ahead = {b + a.panel_stride + (end - begin) * i / kUnrolled * a.weight_stride, a.weight_stride};
            }
            for (int64_t c = column; c < last_column; c += kTileColumns) {
                if (c + kTileColumns <= a.width) {
                    compute_tile<Finish, WholeTile>(a, row, next - row, c, block);
                } else {
                    compute_tile<Finish, PartTile>(a, row, next - row, c, block);
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
    const int64_t tiles = (a.n + kTileRows - 1) / kTileRows;
    const int64_t wanted = panels % a.threads == 0 ? 1 : (4 * a.threads + panels - 1) / panels;
    const int64_t chunks = wanted < tiles ? wanted : tiles;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t task = 0; task < panels * chunks; task++) {
        const int64_t chunk = task % chunks;
        float* copy = a.copies ? a.copies + thread_number() * a.copied_rows * kPanelColumns : nullptr;
        compute_panel<Finish>(a, task / chunks, a.n * chunk / chunks, a.n * (chunk + 1) / chunks, copy);
        if (a.finish == LinearFinish::activation) settle_far_stores();
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
