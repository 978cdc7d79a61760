// The CPU kernels as the torch-facing files see them: plain pointers in, plain pointers out, one table for each
// instruction set, filled by isa_*.cpp from the same source. A is the accumulation type, float or double.
#pragma once
#include "shared/types.h"

namespace vk {

// add_layer_norm on `rows` rows of `width`; vectors are already in A, null where absent. `row_scale` is one per sample
// of `rows_per_sample` rows; the weight (with the bias) and the scale of a sample lie `weight_step` and `scale_step`
// elements after those of the sample before, 0 where all samples share them. Without `mean` it is add_rms_norm.
// `scratch` holds kLayerNormScratch rows.
constexpr int64_t kLayerNormScratch = 6;

template <class A>
struct LayerNormForward {
  int64_t width, rows_per_sample;
  double eps;
  Rows x, branch;  // branch.data null: plain LayerNorm
  const A *weight, *bias, *branch_bias, *scale, *row_scale;
  int64_t weight_step, scale_step;
  OutRows total, normed;
  A *mean, *rstd;
};

// Gradients of the above; every output may be null. `partial` is this task's [4, width] sums of dweight, dbias,
// dbranch_bias and dscale, without the rows behind the last that is needed; drow_scale gets one number a row, to be
// summed over each sample.
template <class A>
struct LayerNormBackward {
  int64_t width, rows_per_sample;
  Rows dtotal, dnormed, total, branch;
  const A *weight, *mean, *rstd, *branch_bias, *scale, *row_scale;
  int64_t weight_step, scale_step;
  OutRows dx, dbranch;
  bool needs_branch_bias, needs_scale, needs_row_scale;
};

// C[m, n] = A[m, k] B[k, n], of `dtype` (float32 or bfloat16), and what is done to C before it is written: the bias is
// added, then
//   store               out = C
//   activate            pre = C, out = activation(C); `pre` may be `out`
//   activate_backward   out = C * activation'(pre), activated = activation(pre) where not null, sums += out by columns
//   gate                B has n columns of gates, then n of ups: pre = C where not null, out = activation(gate) * up
//   gate_backward       out = the gradient of pre, activated = activation(gate) * up where not null, sums as above
// pre of both gates, and out and sums of the second, are 2 n wide: gates, then ups. B of the first has its k in rows.
// Where `dtype` is bfloat16, B may lie in float32 and is rounded as it is read, and `out` may be float32, which gets what
// bfloat16 has (of Then::store alone).
// Of the steps of A and B, in elements, one is 1. Where that one is along k, bfloat16 wants k and the other step even.
// Parts of B below each other have an even number of rows then, too; side by side they end where panels do, but for a gate's.
// out, pre and activated are packed [m, n]; activated may be asked for as the panels of a B with m as its k instead.
enum class Then { store, activate, activate_backward, gate, gate_backward };

struct Steps {
  const char* data;
  int64_t row, col;
};

// Of a matrix that lies in up to kMostParts tensors of `rows` by `cols`, below each other or side by side.
constexpr int64_t kMostParts = 3;
struct Parts {
  const char* data[kMostParts];
  int64_t rows, cols, row, col;
};

struct Product {
  int64_t m, n, k;
  DType dtype, b_dtype, out_dtype;
  Steps a;
  Parts b;
  const float* bias;
  Then then;
  Activation activation;
  char *out, *pre, *activated;
  bool activated_in_panels;
  bool split;        // float32 may be multiplied in pieces (product_words.h)
  bool* not_finite;  // set where a sum of such a product is not: that of float32 may be another
  // Of a product of some terms (k) at a time: the first in B and in the panels, and whether out += C (of Then::store)
  int64_t begin = 0, packed_from = 0;
  bool add = false;
  float* between = nullptr;  // of bfloat16, packed [m, n]: where C is kept until its last terms, which alone are rounded
  bool ends = true;          // whether these are the last
  bool past_caches = false;  // whether `out` is stored so: float32 of Then::store, its rows whole lines of the cache
  int64_t panel_step = 0;  // floats from one panel to the next
};

// Of a Product on the instruction set in use: rows of a tile, tiles that go best together, panels of columns, floats of
// a panel and of the scratch that each thread needs; terms (k) that are best multiplied at a time; and whether the matrix
// unit multiplies, for which A is copied.
struct ProductSizes {
  int64_t rows, tiles, panels, panel, scratch, depth;
  bool by_tiles;
};

// The same where A has few rows or, for the gradient of a weight, few terms (k): the one operand that is large, B or C, is
// read or written once and where it lies. Of B, one step is 1; those of A, and both of few terms, are any.
// Tasks that threads share, floats of the packed small operands and of the scratch that each thread needs.
struct FewSizes {
  int64_t tasks, packed, scratch;
};

// One head of attention. All rows are [tokens, width]; `factor`, `unit` and stats, where a row's log-sum stands
// `stats_row` behind its largest score, are as in vitkernels/ops/attention.py's score_units. `added`: the mask is, where
// a bool one hides. Of a `group` of heads that share k and v, the members come in order and with one scratch: the first
// packs k and v, the last one writes their gradients. With `columns` there is no mask: the keys are an image of so many,
// and a query's row of rel_h is added to the scores of the image's rows, of rel_w to those of its columns.
struct Head {
  int64_t queries, keys, width, stats_row, member, group;
  double scale, factor, unit;
  bool causal, added;
  Rows q, k, v, mask;  // mask.data null: none; its steps are 0 along broadcast axes
  Rows rel_h = {}, rel_w = {};
  int64_t columns = 0;
};

// One token of rotary, rows being its heads; sin.data null: no position, nothing turns. A row step of 0 is shared by all
// heads. `norm`, over a head's width, comes before the turn. Backward x is the gradient that arrives, `input` what was
// normalised, and where dweight and dbias are not null the gradients of weight and bias, [width], are added to them.
// `scratch` holds kRotaryScratch rows.
constexpr int64_t kRotaryScratch = 7;
enum class HeadNorm { none, layer, rms };

template <class A>
struct Rotary {
  int64_t heads, width;
  bool half, backward;
  Rows x, sin, cos;
  OutRows out;
  HeadNorm norm = HeadNorm::none;
  A eps = 0;
  const A *weight = nullptr, *bias = nullptr;  // null: ones, zeros
  Rows input = {};
  A *dweight = nullptr, *dbias = nullptr;
};

template <class A>
struct Kernels {
  void (*load)(A* out, const char* in, DType dtype, int64_t step, int64_t count);
  void (*store)(char* out, DType dtype, int64_t step, const A* in, int64_t count);
  void (*scale)(A* row, A factor, A offset, int64_t count);  // row = row * factor + offset

  void (*layer_norm_forward)(const LayerNormForward<A>&, int64_t begin, int64_t end, A* scratch);
  void (*layer_norm_backward)(const LayerNormBackward<A>&, int64_t begin, int64_t end, A* partial, A* drow_scale,
                              A* scratch);

  // out[i] = activation(pre[i])
  void (*activate)(Activation, char* out, const char* pre, DType dtype, int64_t count);
  // dpre = dout * activation'(pre), activated = activation(pre), dbias += column sums of dpre, over `rows` rows. With k > 0
  // `activated` is the panels of a bfloat16 B of k rows: these are its rows from `first`, an even number, on.
  void (*activate_backward)(Activation, char* dpre, char* activated, A* dbias, const char* dout, const char* pre,
                            DType dtype, int64_t rows, int64_t width, int64_t first, int64_t k);
  // The same for pre = [gate, up] a row, 2 * width wide, as dpre and dbias are: out = activation(gate) * up
  void (*gate)(Activation, char* out, const char* pre, DType dtype, int64_t rows, int64_t width);
  // `activated` may be `dout`
  void (*gate_backward)(Activation, char* dpre, char* activated, A* dbias, const char* dout, const char* pre,
                        DType dtype, int64_t rows, int64_t width);

  ProductSizes (*product_sizes)(const Product&);
  // B's panels [first, last) into `packed`, where the next reads them
  void (*product_pack)(const Product&, float* packed, int64_t first, int64_t last);
  // rows [begin, end) of panels [first, last); `sums` has out's columns, or is null. `again`: of rows that are one block,
  // `scratch` being as the last call left it
  void (*product)(const Product&, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                  float* sums, float* scratch, bool again);

  FewSizes (*few_sizes)(const Product&, bool terms);
  void (*few_pack)(const Product&, bool terms, float* packed);
  // tasks [first, last); `sums` as above, of few rows alone
  void (*few_product)(const Product&, bool terms, const float* packed, int64_t first, int64_t last, float* sums,
                      float* scratch);

  int64_t (*attention_scratch)(const Head&, bool backward);  // elements of A
  void (*attention_forward)(const Head&, OutRows out, A* stats, A* scratch);
  // dmask, when not null, is accumulated into; its steps are 0 along broadcast axes. drel_h and drel_w may be null
  void (*attention_backward)(const Head&, Rows out, Rows dout, const A* stats, OutRows dq, OutRows dk, OutRows dv,
                             A* dmask, int64_t dmask_row, int64_t dmask_col, OutRows drel_h, OutRows drel_w,
                             A* scratch);

  void (*rotary)(const Rotary<A>&, A* scratch);
};

template <class A>
const Kernels<A>& kernels();  // of the instruction set in use

// 0 baseline, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx. A negative number asks; one above what the processor has sets the
// highest it has.
int64_t set_isa(int64_t wanted);

template <class A>
constexpr DType same_dtype() {
  return sizeof(A) == 4 ? DType::f32 : DType::f64;
}

}  // namespace vk
