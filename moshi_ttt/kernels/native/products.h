// Products of small matrices that lie in a core's caches, in the compiler's portable vectors.
//
// Matrices have rows one after the other. A library packs its operands first, which pays for large matrices:
// here one has few rows, those of a mini-batch's tokens, and the other, inner weights, is read where it lies.

#pragma once

#include <algorithm>
#include <cstring>

namespace ttt {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 8;
#endif
constexpr long CACHE_BYTES = 1 << 15;  // of the innermost cache, what an operand may fill

// Lanes that are computed together; they may lie at any address of a T.
template <class T>
struct LanesOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
    static constexpr int count = VECTOR_BYTES / sizeof(T);
};
template <class T>
using Lanes = typename LanesOf<T>::type;

template <class T>
inline Lanes<T>& lanes(T* at) {
    return *reinterpret_cast<Lanes<T>*>(at);
}
template <class T>
inline const Lanes<T>& lanes(const T* at) {
    return *reinterpret_cast<const Lanes<T>*>(at);
}

// What happens to a product: it replaces what is there, is added to it, or subtracted from it.
enum class Into { set, add, subtract };

// A matrix, or its transpose: element (i, j) is `data[i * row + j * column]`, and one of the two is 1.
template <class T>
struct Left {
    const T* data;
    long row, column;
};
template <class T>
inline Left<T> plain(const T* data, long width) {
    return {data, width, 1};
}
template <class T>
inline Left<T> transposed(const T* data, long width) {
    return {data, 1, width};
}

// ROWS x VECTORS lanes of c from `depth` terms.
template <class T, int ROWS, int VECTORS, Into INTO>
inline void tile(long depth, Left<T> a, const T* b, long b_width, T* c, long c_width) {
    constexpr int LANES = LanesOf<T>::count;
    Lanes<T> sums[ROWS][VECTORS] = {};
    for (long k = 0; k < depth; k++) {
        Lanes<T> right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = lanes(b + k * b_width + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            const T left = a.data[r * a.row + k * a.column];
            for (int v = 0; v < VECTORS; v++) sums[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            Lanes<T>& into = lanes(c + r * c_width + v * LANES);
            if (INTO == Into::set) into = sums[r][v];
            if (INTO == Into::add) into += sums[r][v];
            if (INTO == Into::subtract) into -= sums[r][v];
        }
}

// The same for fewer columns than a vector has lanes.
template <class T, int ROWS, Into INTO>
inline void narrow_tile(long depth, Left<T> a, const T* b, long b_width, T* c, long c_width, long columns) {
    constexpr int LANES = LanesOf<T>::count;
    T sums[ROWS][LANES] = {};
    for (long k = 0; k < depth; k++)
        for (int r = 0; r < ROWS; r++) {
            const T left = a.data[r * a.row + k * a.column];
            for (long n = 0; n < columns; n++) sums[r][n] += left * b[k * b_width + n];
        }
    for (int r = 0; r < ROWS; r++)
        for (long n = 0; n < columns; n++) {
            T& into = c[r * c_width + n];
            if (INTO == Into::set) into = sums[r][n];
            if (INTO == Into::add) into += sums[r][n];
            if (INTO == Into::subtract) into -= sums[r][n];
        }
}

// `rows` rows in tiles of ROWS, and what is left over in smaller ones. VECTORS is 0 for a narrow tile.
template <class T, int ROWS, int VECTORS, Into INTO>
inline void tiles(long rows, long depth, Left<T> a, const T* b, long b_width, T* c, long c_width,
                  long columns) {
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS) {
        const Left<T> from = {a.data + row * a.row, a.row, a.column};
        if constexpr (VECTORS > 0)
            tile<T, ROWS, VECTORS, INTO>(depth, from, b, b_width, c + row * c_width, c_width);
        else
            narrow_tile<T, ROWS, INTO>(depth, from, b, b_width, c + row * c_width, c_width, columns);
    }
    if constexpr (ROWS > 1)
        if (row < rows)
            tiles<T, ROWS / 2, VECTORS, INTO>(rows - row, depth, {a.data + row * a.row, a.row, a.column}, b,
                                              b_width, c + row * c_width, c_width, columns);
}

template <class T, Into INTO, bool PLAIN>
inline void columns_of(long rows, long columns, long depth, Left<T> a, const T* b, long b_width, T* c,
                       long c_width) {
    constexpr int LANES = LanesOf<T>::count;
    if (PLAIN)
        a.column = 1;  // known to the compiler
    else
        a.row = 1;
    long n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        tiles<T, TILE_ROWS, 2, INTO>(rows, depth, a, b + n, b_width, c + n, c_width, 0);
    for (; n + LANES <= columns; n += LANES)
        tiles<T, 2 * TILE_ROWS, 1, INTO>(rows, depth, a, b + n, b_width, c + n, c_width, 0);
    if (n < columns)
        tiles<T, TILE_ROWS, 0, INTO>(rows, depth, a, b + n, b_width, c + n, c_width, columns - n);
}

// c (+)= a b, of [rows, depth] and [depth, columns]. c must not overlap the others.
template <Into INTO, class T>
void product(long rows, long columns, long depth, Left<T> a, const T* b, long b_width, T* c, long c_width) {
    // Where b fits into the innermost cache, c is gone through in its own order: rows outside.
    const bool fits = depth * columns * long(sizeof(T)) <= CACHE_BYTES;
    const long step = fits ? 2 * TILE_ROWS : rows;
    for (long row = 0; row < rows; row += step) {
        const long count = std::min(step, rows - row);
        const Left<T> from = {a.data + row * a.row, a.row, a.column};
        T* into = c + row * c_width;
        if (a.column == 1)
            columns_of<T, INTO, true>(count, columns, depth, from, b, b_width, into, c_width);
        else
            columns_of<T, INTO, false>(count, columns, depth, from, b, b_width, into, c_width);
    }
}

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    typedef int type;
};
template <>
struct IntegerOf<double> {
    typedef long type;
};

// A square of as many rows as a vector has lanes, transposed by exchanging ever smaller blocks.
template <class T>
inline void transpose_square(const T* from, long from_width, T* to, long to_width) {
    constexpr int LANES = LanesOf<T>::count;
    typedef typename IntegerOf<T>::type Integer;
    typedef Integer Mask __attribute__((vector_size(VECTOR_BYTES)));
    Lanes<T> rows[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) rows[r] = lanes(from + r * from_width);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
        Mask first, second;
        for (int p = 0; p < LANES; p++) {
            first[p] = p & half ? p - half + LANES : p;
            second[p] = p & half ? p + LANES : p + half;
        }
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++)
            if (!(r & half)) {
                const Lanes<T> a = rows[r], b = rows[r + half];
                rows[r] = __builtin_shuffle(a, b, first);
                rows[r + half] = __builtin_shuffle(a, b, second);
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) lanes(to + r * to_width) = rows[r];
}

// to[j, i] = from[i, j], of [rows, columns].
template <class T>
void transpose(long rows, long columns, const T* from, long from_width, T* to, long to_width) {
    constexpr int LANES = LanesOf<T>::count;
    const long whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
    for (long i = 0; i < whole_rows; i += LANES)
        for (long j = 0; j < whole_columns; j += LANES)
            transpose_square(from + i * from_width + j, from_width, to + j * to_width + i, to_width);
    for (long i = 0; i < rows; i++)
        for (long j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            to[j * to_width + i] = from[i * from_width + j];
}

}  // namespace ttt
