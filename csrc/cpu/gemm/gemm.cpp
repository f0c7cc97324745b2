// The blocked gemm, C = A B: forward z = x W' + b, backward dx = dz W and dW = dz' x.
//
// A panel of B, 64 columns wide, is packed so that it lies dense in the L2 cache; blocks
// of A meet it in `gemm_block` (microkernels.h), which keeps 6 x 64 sums in registers and reads A where it
// lies, at any strides. That loop runs at 98 % of the multiply-add peak, as oneDNN's does, without code
// generated at run time for every new shape.
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/gemm/blocking.h"

namespace mlpext::cpu {
namespace {

constexpr int64_t block_terms = 512;   // a panel of float is 128 KiB, and its sums stay as exact as torch's
constexpr int64_t unpacked_rows = 60;  // of a block of A that is read where it lies
constexpr int64_t group_rows = 17 * unpacked_rows;  // of A that meet one packing of a panel
constexpr int64_t sum_rows = 60;                    // of dz that are added up before they are added to db
constexpr int64_t packs_from = 128;  // columns of C that pay for packing A where its terms lie apart
constexpr int64_t packs_terms = 64;  // terms of A from which it pays: so many pages may stay open
constexpr int64_t most_panels = 16;  // of b that are packed together: 2 MiB
constexpr int64_t few_rows = 6, few_terms = 8;  // of A and of B, below which memory is what takes the time

// The element types: M in memory, T in the loops.
template <Dtype> struct Types;
template <> struct Types<float64> {
  using M = double;
  using T = double;
};
template <> struct Types<float32> {
  using M = float;
  using T = float;
};
template <> struct Types<bfloat16> {
  using M = uint16_t;
  using T = float;
};
template <> struct Types<float16> {
  using M = uint16_t;
  using T = float;
};

}  // namespace

// Few rows of x, or few columns of the result: dot products with the rows of w as they lie, a panel of w at
// a time. That saves packing w, and columns that do not fill a register of `gemm_block`.
bool by_few_rows(const Matrix& x, const Matrix& w) {
  const int64_t most = kernels().gemm.columns_at_once == panel_columns ? 48 : 12;
  return x.column_stride == 1 && w.column_stride == 1 &&
         (x.rows <= std::min(most, x.columns / 16) || (w.rows <= 8 && x.columns >= 32));
}

namespace {

// With `pairs`, of bfloat16: the T of an operand is a pair of M, neighbours along the sum; an odd end is
// paired with 0.
template <Dtype dtype, bool pairs = false> struct Gemm {
  using M = typename Types<dtype>::M;
  using T = typename Types<dtype>::T;
  static constexpr bool widens = sizeof(M) != sizeof(T);
  static constexpr Dtype sum_dtype = dtype == float64 ? float64 : float32;

  // Part of an operand as the loops take it; with a `strip`, packed in strips (kernels.h).
  struct Operand {
    const T* data;
    int64_t row_stride, column_stride, strip = 0;
  };

  // Sums, or what they start from.
  struct SumRows {
    T* data;
    int64_t stride;
  };

  // Strips and panels are a few lines longer than they need to be: at strides of whole pages all of them
  // would share the same few lines of the L1 cache.
  static constexpr int64_t strip_stride = strip_rows * block_terms + 16;
  static constexpr int64_t panel_stride = block_terms * panel_columns + 64;

  // Rows of a block of A: whole strips that fill half of the L2 cache, a panel of B and its sums beside them.
  static int64_t block_rows() {
    static const int64_t strips = l2_bytes() / 2 / (strip_stride * static_cast<int64_t>(sizeof(T)));
    return std::clamp<int64_t>(strips, 10, 80) * strip_rows;
  }

  // T in the space of n M along a sum.
  static int64_t terms_of(int64_t n) { return pairs ? (n + 1) / 2 : n; }

  static const M* at(const Matrix& m, int64_t i, int64_t j) {
    return static_cast<const M*>(m.data) + i * m.row_stride + j * m.column_stride;
  }

  // A panel of b, or from its row `first` on some rows of one: dense rows of 64 columns where the loops take
  // all of them at once, else strips of 16 columns, which a loop can go along without a gap: at 256 bytes from
  // row to row they would share a quarter of the L1 cache.
  static Operand pack_panel(const Matrix& b, int64_t t, int64_t j, int64_t terms, int64_t columns, T* to,
                            int64_t first = 0) {
    if (kernels().gemm.columns_at_once == panel_columns) {
      pack_columns(b, t, j, terms, columns, to + first * panel_columns);
      return {to, panel_columns, 1};
    }
    for (int64_t c = 0; c < columns; c += strip_columns) {
      const int64_t n = std::min(strip_columns, columns - c);
      widen({at(b, t, j + c), terms, n, b.row_stride, b.column_stride},
            to + c * block_terms + first * strip_columns, strip_columns);
    }
    return {to, strip_columns, 1, strip_columns * block_terms};
  }

  // Terms t... along the rows of b and columns j..., to rows 64 apart.
  static void pack_columns(const Matrix& b, int64_t t, int64_t j, int64_t terms, int64_t columns, T* to) {
    const GemmKernels& kernel = kernels().gemm;
    if constexpr (!pairs) {
      widen({at(b, t, j), terms, columns, b.row_stride, b.column_stride}, to, panel_columns);
    } else {
      int64_t done = 0;
      if (b.row_stride == 1 && b.column_stride % 2 == 0) {
        done = std::min(terms, b.rows / 2 - t);
        kernel.transpose[float32](at(b, 2 * t, j), b.column_stride / 2, to, panel_columns, columns, done);
      }
      for (; done < terms; ++done) {
        const int64_t row = 2 * (t + done);
        std::array<M, 2 * panel_columns> buffer;
        const M* first = row_of(b, row, j, columns, buffer.data());
        const M* second =
            row + 1 < b.rows ? row_of(b, row + 1, j, columns, buffer.data() + panel_columns) : nullptr;
        kernel.zip(first, second, to + done * panel_columns, columns);
      }
    }
  }

  // Rows i... and terms t... of an operand that the loops read at any strides.
  static Operand block_of(const Matrix& a, int64_t i, int64_t t, int64_t rows, int64_t terms, T* space) {
    if constexpr (pairs) {
      if (a.column_stride == 1 && a.row_stride % 2 == 0 && 2 * (t + terms) <= a.columns)
        return {reinterpret_cast<const T*>(at(a, i, 2 * t)), a.row_stride / 2, 1};
      const int64_t n = std::min(2 * terms, a.columns - 2 * t);
      for (int64_t r = 0; r < rows; ++r) {
        M* const to = reinterpret_cast<M*>(space + r * terms);
        const M* from = row_of(a, i + r, 2 * t, n, to);
        if (from != to) std::copy_n(from, n, to);
        if (n % 2) to[n] = 0;
      }
      return {space, terms, 1};
    } else if constexpr (widens) {
      widen({at(a, i, t), rows, terms, a.row_stride, a.column_stride}, space, terms);
      return {space, terms, 1};
    } else {
      return {at(a, i, t), a.row_stride, a.column_stride};
    }
  }

  // The same of an operand whose rows are neighbours in memory, packed in strips: term by term, so that
  // memory is read in order, where the loops would open a page for each term.
  static Operand pack_strips(const T* a, int64_t term_stride, int64_t rows, int64_t terms, T* space) {
    const int64_t whole = rows / strip_rows, left = rows % strip_rows;
    T* to = space;
    for (int64_t t = 0; t < terms; ++t, a += term_stride, to += strip_rows) {
      for (int64_t s = 0; s < whole; ++s)
        std::memcpy(to + s * strip_stride, a + s * strip_rows, strip_rows * sizeof(T));
      std::copy_n(a + whole * strip_rows, left, to + whole * strip_stride);
    }
    return {space, 1, strip_rows, strip_stride};
  }

  // n elements of a row that lie one after the other: where they are, or copied to the buffer.
  static const M* row_of(const Matrix& m, int64_t i, int64_t j, int64_t n, M* buffer) {
    const M* from = at(m, i, j);
    if (m.column_stride == 1) return from;
    for (int64_t c = 0; c < n; ++c) buffer[c] = from[c * m.column_stride];
    return buffer;
  }

  // to[i, j] = m[i, j], in T, with rows of `stride`: straight from rows that lie dense, by transposing
  // squares where columns do, and through a buffer for every other layout.
  static void widen(const Matrix& m, T* to, int64_t stride) {
    const GemmKernels& kernel = kernels().gemm;
    if (m.column_stride == 1) {
      kernel.widen[dtype](m.data, m.row_stride, to, stride, m.rows, m.columns);
    } else if (m.row_stride == 1 && !widens) {
      kernel.transpose[dtype](m.data, m.column_stride, to, stride, m.columns, m.rows);
    } else {
      std::array<M, panel_columns> buffer;
      for (int64_t i = 0; i < m.rows; ++i)
        for (int64_t j = 0; j < m.columns; j += panel_columns) {
          const int64_t n = std::min(panel_columns, m.columns - j);
          kernel.widen[dtype](row_of(m, i, j, n, buffer.data()), 0, to + i * stride + j, 0, 1, n);
        }
    }
  }

  // What `gemm_block` is given at a time, of b in `panels` that are packed together. `packs_a`: a is packed
  // too, in strips.
  struct Blocks {
    int64_t columns = panel_columns, rows = unpacked_rows, terms = block_terms, panels = 1;
    bool packs_a = false;
  };

  // Where a does not fit the L2 cache: as few blocks of it as do, all of one height, each of which meets up
  // to 16 panels of b.
  static Blocks blocks_in_l2(int64_t rows, bool packs_a) {
    const int64_t count = std::max<int64_t>(1, (rows + block_rows() - 1) / block_rows());
    const int64_t height = round_up((rows + count - 1) / count, strip_rows);
    return {.rows = height, .panels = most_panels, .packs_a = packs_a};
  }
  static Blocks blocks_of(int64_t rows, int64_t columns) {
    const bool large = !widens && rows > 4 * block_rows() && columns > 2 * panel_columns;
    return large ? blocks_in_l2(rows, false) : Blocks{};
  }

  // A product of a whose terms lie half a page or more apart, as in dW = dz' x, would open a page of memory
  // for each of them, at every panel anew.
  static bool packs(const Matrix& a, int64_t columns) {
    return !widens && a.row_stride == 1 && a.column_stride * sizeof(T) >= 2048 && a.columns >= packs_terms &&
           columns >= packs_from;
  }

  // A product that reads b only a few times, or writes more than it reads, is as fast as memory: it goes
  // along the rows of b, or of the result, where strips of 64 columns would touch a page of memory each.
  static Blocks blocks_of(const Matrix& a, const Matrix& b) {
    if (packs(a, b.columns)) return blocks_in_l2(a.rows, true);
    if (!widens && b.column_stride == 1) {
      if (a.rows <= few_rows) return {.columns = 2048, .terms = 16};
      if (b.rows <= few_terms) return {.columns = 8192 / std::max<int64_t>(1, b.rows), .rows = 6};
    }
    return blocks_of(a.rows, b.columns);
  }

  // The sums of the product of a (rows, terms) and b (terms, columns), block by block.
  //   load_a(i, t, rows, terms, space) and load_b(t, j, terms, columns, space, first)  an Operand; space to pack
  //     it, of b from row `first` of a panel on
  //   start(i, j, columns)  what the sums start from, rows a stride apart; null for 0
  //   sums(i, j)            where they are kept; null to keep them in scratch memory
  //   finish(OutputTile, SumRows)
  // Columns are those of the product; the panel has `pieces` sums for each. A panel of b is packed once for all
  // rows of a that the L2 cache about holds. Of a larger a a block at a time is there and meets up to 16
  // panels (Goto and van de Geijn, 2008): panel by panel all of a would come from L3 for each 64 columns, at
  // (2048, 1000, 1000) 131 MB. What is packed is packed once for a block of terms.
  template <class LoadA, class LoadB, class Start, class Sums, class Finish>
  static void multiply(int64_t rows, int64_t columns, int64_t terms, int64_t pieces, Blocks blocks,
                       LoadA load_a, LoadB load_b, Start start, Sums sums, Finish finish) {
    const auto gemm_block = pairs ? kernels().gemm.block_pairs : kernels().gemm.block[sum_dtype];
    const int64_t step = pieces == 1   ? blocks.columns
                         : pieces <= 4 ? panel_columns / pieces / 16 * 16
                                       : panel_columns / pieces;
    constexpr int64_t few_terms_at_once = 32;
    const bool together = blocks.panels > 1;
    const int64_t packed_terms =
        blocks.packs_a ? few_terms_at_once : blocks.terms;  // of b: few pages at once
    in_rectangles(
        rows, columns, rows * columns * pieces * terms,
        [&](int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
          const int64_t panels = std::min(blocks.panels, (last_column - first_column + step - 1) / step);
          const int64_t block_size = blocks.packs_a ? block_rows() / strip_rows * strip_stride
                                                    : unpacked_rows * block_terms * widens;
          // Of sums that have no place in the result: those of a group of rows and a panel.
          const int64_t group_size = together ? 0 : group_rows * panel_columns;
          T* const panel =
              reinterpret_cast<T*>(scratch<0>((panels * panel_stride + block_size + group_size) * sizeof(T)));
          T* const block = panel + panels * panel_stride;
          T* const group = block + block_size;
          const int64_t group_step = together ? last_row - first_row : group_rows;
          for (int64_t g = first_row; g < last_row; g += group_step) {
            const int64_t end = std::min(g + group_step, last_row);
            for (int64_t j0 = first_column; j0 < last_column; j0 += panels * step) {
              const int64_t j_end = std::min(j0 + panels * step, last_column);
              int64_t t = 0;
              do {  // once where there are no terms
                const int64_t depth = std::min(blocks.terms, terms - t);
                const bool first = t == 0, last = t + depth == terms;
                std::array<Operand, most_panels> b;
                for (int64_t done = 0; done == 0 || done < depth; done += packed_terms)
                  for (int64_t j = j0, p = 0; j < j_end; j += step, ++p) {
                    const Operand part = load_b(t + done, j, std::min(packed_terms, depth - done),
                                                std::min(step, j_end - j), panel + p * panel_stride, done);
                    if (done == 0) b[p] = part;
                  }
                for (int64_t i = g; i < end; i += blocks.rows) {
                  const int64_t height = std::min(blocks.rows, end - i);
                  const Operand a = load_a(i, t, height, depth, block);
                  const int64_t strip = a.strip ? a.strip : strip_rows * a.row_stride;
                  for (int64_t j = j0, p = 0; j < j_end; j += step, ++p) {
                    const int64_t width = std::min(step, j_end - j);
                    SumRows c = sums(i, j);
                    if (!c.data) c = {group + (first && last ? 0 : (i - g) * panel_columns), panel_columns};
                    const SumRows from = first ? start(i, j, width) : c;
                    const int64_t b_strip = b[p].strip ? b[p].strip : strip_columns;
                    gemm_block(a.data, a.row_stride, a.column_stride, strip, b[p].data, b[p].row_stride,
                               b_strip, from.data, from.stride, c.data, c.stride, height, width * pieces,
                               depth);
                    if (last) finish(OutputTile{i, j, height, width}, c);
                  }
                }
                t += depth;
              } while (t < terms);
            }
          }
        });
  }

  // z = x w' + bias, where B is w': a panel of it is 64 rows of w, transposed as they are packed. The bias is
  // what the sums start from, so that it costs nothing.
  static void forward(const Matrix& x, const Matrix& w, const void* bias, void* z_, OnTile finish) {
    const int64_t rows = x.rows, columns = w.rows, terms = x.columns;
    M* const z = static_cast<M*>(z_);
    const M* const b = static_cast<const M*>(bias);
    if (by_few_rows(x, w)) {
      const auto gemm_few_rows = pairs ? kernels().gemm.few_rows_pairs : kernels().gemm.few_rows[dtype];
      in_rectangles(rows, columns, rows * columns * terms,
                    [&](int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
                      for (int64_t j = first_column; j < last_column; j += panel_columns) {
                        const OutputTile tile{first_row, j, last_row - first_row,
                                              std::min(panel_columns, last_column - j)};
                        gemm_few_rows(at(x, first_row, 0), x.row_stride, at(w, j, 0), w.row_stride,
                                      b ? b + j : nullptr, z + first_row * columns + j, columns, tile.rows,
                                      tile.columns, terms);
                        finish(tile);
                      }
                    });
      return;
    }
    multiply(
        rows, columns, terms_of(terms), 1, blocks_of(rows, columns),
        [&](int64_t i, int64_t t, int64_t m, int64_t n, T* space) { return block_of(x, i, t, m, n, space); },
        [&](int64_t t, int64_t j, int64_t n, int64_t width, T* space, int64_t first) {
          return pack_panel(w.transposed(), t, j, n, width, space, first);
        },
        [&](int64_t, int64_t j, int64_t width) { return bias_row(b, j, width, 1, 0); },
        [&](int64_t i, int64_t j) { return in_result(z, i, j, columns); },
        [&](const OutputTile& tile, SumRows sums) {
          keep(tile, sums, z, columns);
          finish(tile);
        });
  }

  // The same for several pieces: a panel holds the same columns of each, piece after piece, so that what
  // follows finds all of them in the cache, and z is never stored.
  static void several(const Matrix& x, const Matrix& w, const void* bias, int64_t pieces, OnRow finish) {
    const int64_t columns = w.rows / pieces;
    const M* const b = static_cast<const M*>(bias);
    multiply(
        x.rows, columns, terms_of(x.columns), pieces, {},
        [&](int64_t i, int64_t t, int64_t m, int64_t n, T* space) { return block_of(x, i, t, m, n, space); },
        [&](int64_t t, int64_t j, int64_t n, int64_t width, T* space, int64_t) {
          for (int64_t piece = 0; piece < pieces; ++piece)
            pack_columns(w.transposed(), t, piece * columns + j, n, width, space + piece * width);
          return Operand{space, panel_columns, 1};
        },
        [&](int64_t, int64_t j, int64_t width) { return bias_row(b, j, width, pieces, columns); },
        [](int64_t, int64_t) { return SumRows{}; },
        [&](const OutputTile& tile, SumRows sums) {
          for (int64_t i = 0; i < tile.rows; ++i) {
            T* const row = sums.data + i * sums.stride;
            if constexpr (widens) kernels().gemm.narrow[dtype](row, 0, row, 0, 1, tile.columns * pieces);
            finish({tile.row + i, tile.column, tile.columns, row});
          }
        });
  }

  // dx = dz w and dw = dz' x from one dz, formed at most 8 MiB at a time, and db beside it. Of dz as it lies
  // there is nothing to form.
  static void backward(const PreactivationGradient& dz, const Matrix& x, const Matrix& w, void* dx_,
                       void* dw_, void* db_) {
    const int64_t columns = dz.columns;
    M* const dx = static_cast<M*>(dx_);
    M* const dw = static_cast<M*>(dw_);
    // 16 bits are too few to add in.
    T* const db =
        widens && db_ ? reinterpret_cast<T*>(scratch<2>(columns * sizeof(T))) : static_cast<T*>(db_);
    if (db) std::fill_n(db, columns, T(0));

    T* dw_sums = widens ? nullptr : static_cast<T*>(dw_);
    if (dz.matrix && !widens) {
      if (db) add_to_bias(*dz.matrix, db);
      add_chunk(*dz.matrix, dz.matrix->transposed(), x, w, dx, dw, dw_sums, /*first=*/true, /*last=*/true);
    } else {
      // A stride of whole pages would put all rows in the same few lines of the cache. Short rows stay dense,
      // to be formed as one.
      int64_t stride = columns < panel_columns && !widens ? columns : round_up(columns, 16) + 16;
      if (stride * sizeof(T) % 4096 == 0) stride += 16;
      const int64_t most =
          std::max<int64_t>(block_terms / 4, gradient_bytes / std::max<std::size_t>(1, stride * sizeof(T)));
      const int64_t rows = std::min(
          dz.rows, most / (most > block_terms ? block_terms : 2) * (most > block_terms ? block_terms : 2));
      T* const space = reinterpret_cast<T*>(scratch<1>((rows + 1) * stride * sizeof(T)));
      std::unique_ptr<T[]> wide_dw;
      if (widens && dw && rows < dz.rows) wide_dw.reset(dw_sums = new T[columns * x.columns]);
      int64_t i = 0;
      do {  // once where there are no rows
        const int64_t n = std::min(rows, dz.rows - i);
        const auto [by_rows, by_columns] = form(dz, i, n, space, stride, dw);
        if (db) add_to_bias({space, n, columns, stride, 1}, db);
        add_chunk(by_rows, by_columns, {at(x, i, 0), n, x.columns, x.row_stride, x.column_stride}, w,
                  dx ? dx + i * w.columns : nullptr, dw, dw_sums, i == 0, i + n == dz.rows);
        i += n;
      } while (i < dz.rows);
    }
    if constexpr (widens)
      if (db) kernels().gemm.narrow[dtype](db, 0, db_, 0, 1, columns);
  }

 private:
  // Rows of dz, as dx takes them and as dw does. Pairs are of two columns for dx, of two rows for dw: a
  // second copy.
  static std::pair<Matrix, Matrix> form(const PreactivationGradient& dz, int64_t first, int64_t rows, T* to,
                                        int64_t stride, bool for_dw) {
    constexpr int64_t unit = pairs ? 2 : 1;
    M* const narrow = reinterpret_cast<M*>(to);
    T* const zipped = to + round_up(rows, 2) / 2 * stride;
    auto run = [&](int64_t begin, int64_t end) {
      begin *= unit, end = std::min(rows, end * unit);
      if constexpr (pairs) {
        dz.form(first + begin, end - begin, narrow + begin * stride, stride);
        for (int64_t i = begin; i < end; ++i) narrow[i * stride + dz.columns] = 0;
        for (int64_t i = begin; for_dw && i < end; i += 2)
          kernels().gemm.zip(narrow + i * stride, i + 1 < end ? narrow + (i + 1) * stride : nullptr,
                             zipped + i / 2 * stride, dz.columns);
      } else if constexpr (widens) {
        // The 16-bit values of a row lie in the upper half of its space until they are widened.
        for (int64_t i = begin; i < end; ++i) {
          M* const upper = narrow + (2 * i + 1) * stride;
          dz.form(first + i, 1, upper, stride);
          kernels().gemm.widen[dtype](upper, 0, to + i * stride, 0, 1, dz.columns);
        }
      } else {
        dz.form(first + begin, end - begin, to + begin * stride, stride);
      }
    };
    const int64_t units = (rows + unit - 1) / unit,
                  share = 1 + 32768 / (unit * std::max<int64_t>(1, dz.columns));
    if (units <= share) run(0, units);
    else at::parallel_for(0, units, share, run);
    if (pairs)
      return {{to, rows, terms_of(dz.columns), stride / 2, 1},
              {zipped, dz.columns, terms_of(rows), 1, stride}};
    const Matrix formed{to, rows, dz.columns, stride, 1};
    return {formed, formed.transposed()};
  }

  // What some rows of the gradient add, given with the sum along their columns and along their rows; x and dx
  // are the same rows.
  static void add_chunk(const Matrix& by_rows, const Matrix& by_columns, const Matrix& x, const Matrix& w,
                        M* dx, M* dw, T* dw_sums, bool first, bool last) {
    const auto load = [](const Matrix& a, int64_t uses) {
      return [a, packed = packs(a, uses)](int64_t i, int64_t t, int64_t rows, int64_t terms, T* space) {
        const T* from = static_cast<const T*>(a.data) + i * a.row_stride + t * a.column_stride;
        if (packed) return pack_strips(from, a.column_stride, rows, terms, space);
        return Operand{from, a.row_stride, a.column_stride};
      };
    };
    const auto panels = [](const Matrix& b, int64_t uses) {
      return [&b, uses](int64_t t, int64_t j, int64_t n, int64_t width, T* space, int64_t first) {
        return panel_of(b, t, j, n, width, uses, space, first);
      };
    };
    if (dx)
      multiply(
          by_rows.rows, w.columns, by_rows.columns, 1, blocks_of(by_rows, w), load(by_rows, w.columns),
          panels(w, by_rows.rows), [](int64_t, int64_t, int64_t) { return SumRows{}; },
          [&](int64_t i, int64_t j) { return in_result(dx, i, j, w.columns); },
          [&](const OutputTile& tile, SumRows sums) { keep(tile, sums, dx, w.columns); });
    if (dw) {
      const auto sums = [&](int64_t i, int64_t j) {
        return dw_sums ? SumRows{dw_sums + i * x.columns + j, x.columns} : SumRows{};
      };
      multiply(
          by_columns.rows, x.columns, by_columns.columns, 1, blocks_of(by_columns, x),
          load(by_columns, x.columns), panels(x, by_columns.rows),
          [&](int64_t i, int64_t j, int64_t) { return first ? SumRows{} : sums(i, j); }, sums,
          [&](const OutputTile& tile, SumRows sums) {
            if (last) keep(tile, sums, dw, x.columns);
          });
    }
  }

  // Blocks of rows are added to the sum of those before: two levels, for the sake of its last digits.
  static void add_to_bias(const Matrix& dz, T* db) {
    using Addend = std::conditional_t<pairs, M, T>;
    if (dz.column_stride == 1) {
      for (int64_t i = 0; i < dz.rows; i += sum_rows)
        kernels().gemm.add_rows[pairs ? dtype : sum_dtype](
            static_cast<const Addend*>(dz.data) + i * dz.row_stride, dz.row_stride, db,
            std::min(sum_rows, dz.rows - i), dz.columns);
    } else {
      for (int64_t i = 0; i < dz.rows; ++i)
        for (int64_t j = 0; j < dz.columns; ++j)
          db[j] += static_cast<const T*>(dz.data)[i * dz.row_stride + j * dz.column_stride];
    }
  }

  // A panel of B: as it lies where few rows of A will read it, else packed.
  static Operand panel_of(const Matrix& b, int64_t t, int64_t j, int64_t terms, int64_t width, int64_t uses,
                          T* space, int64_t first) {
    if constexpr (!widens)
      if (b.column_stride == 1 && (uses < 48 || b.rows <= few_terms)) return {at(b, t, j), b.row_stride, 1};
    return pack_panel(b, t, j, terms, width, space, first);
  }

  // The bias of the sums of a panel: that of each piece, one after the other.
  static SumRows bias_row(const M* bias, int64_t j, int64_t width, int64_t pieces, int64_t piece_stride) {
    if (!bias) return {};
    if constexpr (!widens)
      if (pieces == 1) return {const_cast<T*>(bias) + j, 0};
    thread_local std::array<T, panel_columns> row;
    for (int64_t piece = 0; piece < pieces; ++piece)
      kernels().gemm.widen[dtype](bias + piece * piece_stride + j, 0, row.data() + piece * width, 0, 1,
                                  width);
    return {row.data(), 0};
  }

  // Sums are kept where the result will be, unless it is of 16 bits.
  static SumRows in_result(M* result, int64_t i, int64_t j, int64_t stride) {
    if constexpr (widens) return {};
    else return {result + i * stride + j, stride};
  }
  static void keep(const OutputTile& tile, SumRows sums, M* result, int64_t stride) {
    if constexpr (widens)
      kernels().gemm.narrow[dtype](sums.data, sums.stride, result + tile.row * stride + tile.column, stride,
                                   tile.rows, tile.columns);
  }
};

template <class Run> void by_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case float64: return run(Gemm<float64>());
    case float32: return run(Gemm<float32>());
    case bfloat16: return has_pairs() ? run(Gemm<bfloat16, true>()) : run(Gemm<bfloat16>());
    default: return run(Gemm<float16>());
  }
}

}  // namespace

bool has_pairs() {
#if defined(__x86_64__)
  static const bool machine = __builtin_cpu_supports("avx512bf16");
  return machine && kernels().gemm.block_pairs;
#else
  return false;
#endif
}

void copy_rows(Dtype dtype, const Matrix& from, void* to, int64_t stride) {
  if (from.row_stride == 1) {
    kernels().gemm.transpose[dtype](from.data, from.column_stride, to, stride, from.columns, from.rows);
    return;
  }
  by_dtype(dtype, [&](auto gemm) {
    using M = typename decltype(gemm)::M;
    for (int64_t i = 0; i < from.rows; ++i)
      for (int64_t j = 0; j < from.columns; ++j) static_cast<M*>(to)[i * stride + j] = *gemm.at(from, i, j);
  });
}

void gemm_forward(Dtype dtype, const Matrix& x, const Matrix& w, const void* bias, void* z, OnTile finish) {
  by_dtype(dtype, [&](auto gemm) { gemm.forward(x, w, bias, z, finish); });
}

void gemm_pieces(Dtype dtype, const Matrix& x, const Matrix& w, const void* bias, int64_t pieces,
                 OnRow finish) {
  by_dtype(dtype, [&](auto gemm) { gemm.several(x, w, bias, pieces, finish); });
}

void gemm_backward(Dtype dtype, const PreactivationGradient& dz, const Matrix& x, const Matrix& w, void* dx,
                   void* dw, void* db) {
  if (dz.winners && maxout_gradient(dtype, *dz.winners, x, w, dx, dw)) {
    if (!db) return;
    dx = dw = nullptr;
  }
  by_dtype(dtype, [&](auto gemm) { gemm.backward(dz, x, w, dx, dw, db); });
}

}  // namespace mlpext::cpu
